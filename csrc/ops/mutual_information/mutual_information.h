// mutual_information_loss: the mutual information of two images' intensities, normalised or not,
// from their joint histogram by Parzen windows, and its exact gradient. joint_histogram: that
// histogram.
#pragma once

#include "core/op.h"

namespace regkernels {

void mutual_information_loss_cpu(const Context& context, const Call& call);
void mutual_information_loss_cuda(const Context& context, const Call& call);
void mutual_information_loss_grad_cpu(const Context& context, const Call& call);
void mutual_information_loss_grad_cuda(const Context& context, const Call& call);
void joint_histogram_cpu(const Context& context, const Call& call);
void joint_histogram_cuda(const Context& context, const Call& call);

}  // namespace regkernels
