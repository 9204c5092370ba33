#include "ops/gaussian_smooth/kernels.h"

namespace reg {

void gaussian_smooth_cuda(const Context& context, const Call& call) {
  gaussian_smooth(Cuda(context), call);
}
void gaussian_smooth_grad_cuda(const Context& context, const Call& call) {
  gaussian_smooth_grad(Cuda(context), call);
}

}  // namespace reg
