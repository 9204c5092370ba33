#include "ops/coverage/kernels.h"

namespace regkernels {

void coverage_cuda(const Context& context, const Call& call) { coverage(Cuda(context), call); }

}  // namespace regkernels
