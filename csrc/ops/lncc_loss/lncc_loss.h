// lncc_loss: the local normalized cross-correlation of two images, and its exact gradient.
#pragma once

#include "core/op.h"

namespace regkernels {

void lncc_loss_cpu(const Context& context, const Call& call);
void lncc_loss_cuda(const Context& context, const Call& call);
void lncc_loss_grad_cpu(const Context& context, const Call& call);
void lncc_loss_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels
