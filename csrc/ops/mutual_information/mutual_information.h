// mutual_information_loss: the mutual information of two images' intensities, normalised or not,
// from their joint histogram by Parzen windows, and its exact gradient. joint_histogram: that
// histogram.
//
// Both consist of three steps, each of which is an op as well, for volumes of which every device
// has a part. value_extremes: what is known of the values before they are counted.
// joint_counts: the histogram, not yet divided by its sum, as integers.
// mutual_information_of_counts: what follows from it. In between, devices combine the extremes by
// their maximum and the counts by their sum.
#pragma once

#include "core/op.h"

namespace regkernels {

void mutual_information_loss_cpu(const Context& context, const Call& call);
void mutual_information_loss_cuda(const Context& context, const Call& call);
void mutual_information_loss_grad_cpu(const Context& context, const Call& call);
void mutual_information_loss_grad_cuda(const Context& context, const Call& call);
void joint_histogram_cpu(const Context& context, const Call& call);
void joint_histogram_cuda(const Context& context, const Call& call);
void value_extremes_cpu(const Context& context, const Call& call);
void value_extremes_cuda(const Context& context, const Call& call);
void joint_counts_cpu(const Context& context, const Call& call);
void joint_counts_cuda(const Context& context, const Call& call);
void mutual_information_of_counts_cpu(const Context& context, const Call& call);
void mutual_information_of_counts_cuda(const Context& context, const Call& call);

}  // namespace regkernels
