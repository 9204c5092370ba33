#include "ops/invert_displacement/kernels.h"

namespace reg {

void invert_displacement_cpu(const Context& context, const Call& call) {
  invert_displacement(Cpu(context), call);
}

}  // namespace reg
