#include "ops/coverage/kernels.h"

namespace regkernels {

void coverage_cpu(const Context& context, const Call& call) { coverage(Cpu(context), call); }

}  // namespace regkernels
