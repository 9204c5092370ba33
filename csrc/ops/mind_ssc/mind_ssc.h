// mind_ssc: modality-independent neighbourhood descriptors by self-similarity context, and the
// gradient of the image.
//
// A descriptor compares pairs of patches near its voxel: those around two of the voxel's neighbours
// that lie `dilation` away along two different axes. The distance of a pair is the mean squared
// difference of its patches. Two pairs are each other's shifted copies, (p, q) at a voxel x and
// (-q, -p) at x + p + q, so that half as many arrays of distances as there are channels will do.
//
// Devices that share a volume take its steps one by one: `mind_ssc_variances` gives the variance of
// each voxel, the devices take the mean of those of the volume, and `mind_ssc_of_variance` is the
// rest.
//
// Everything is a gather: the same bits come every time, on either device.
#pragma once

#include "core/op.h"

namespace regkernels {

void mind_ssc_cpu(const Context& context, const Call& call);
void mind_ssc_cuda(const Context& context, const Call& call);
void mind_ssc_grad_cpu(const Context& context, const Call& call);
void mind_ssc_variances_cpu(const Context& context, const Call& call);
void mind_ssc_of_variance_cpu(const Context& context, const Call& call);
void mind_ssc_grad_cuda(const Context& context, const Call& call);
void mind_ssc_variances_cuda(const Context& context, const Call& call);
void mind_ssc_of_variance_cuda(const Context& context, const Call& call);

}  // namespace regkernels
