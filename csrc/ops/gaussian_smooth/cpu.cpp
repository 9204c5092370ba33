#include "ops/gaussian_smooth/kernels.h"

namespace reg {

void gaussian_smooth_cpu(const Context& context, const Call& call) {
  gaussian_smooth(Cpu(context), call);
}
void gaussian_smooth_grad_cpu(const Context& context, const Call& call) {
  gaussian_smooth_grad(Cpu(context), call);
}

}  // namespace reg
