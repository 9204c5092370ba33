// lncc_loss: the local normalized cross-correlation of two images, and its exact gradient.
// lncc_loss_share: what some planes of larger images have of a mean, of which the divisor is known.
#pragma once

#include "core/op.h"

namespace regkernels {

void lncc_loss_cpu(const Context& context, const Call& call);
void lncc_loss_cuda(const Context& context, const Call& call);
void lncc_loss_grad_cpu(const Context& context, const Call& call);
void lncc_loss_grad_cuda(const Context& context, const Call& call);
void lncc_loss_share_cpu(const Context& context, const Call& call);
void lncc_loss_share_cuda(const Context& context, const Call& call);

}  // namespace regkernels
