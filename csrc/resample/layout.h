#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/host_device.h"

namespace regkernels {

// The two layouts say how an array of voxels with channels lies in memory: from one voxel to the
// next are kPixel elements, at(voxel, channel) is the offset of an element, and channel(c) that of
// a voxel's channel from the voxel's first.
struct ChannelsFirst {
  static constexpr bool kLast = false;
  static constexpr int kPixel = 1;
  int channels;
  int64_t volume;  // voxels from one channel to the next
  REGKERNELS_HD int count() const { return channels; }
  REGKERNELS_HD int64_t channel(int c) const { return c * volume; }
  REGKERNELS_HD int64_t at(int64_t voxel, int c) const { return channel(c) + voxel; }
};

template <int D>
struct ChannelsLast {
  static constexpr bool kLast = true;
  static constexpr int kPixel = D;
  REGKERNELS_HD constexpr int count() const { return D; }
  REGKERNELS_HD int64_t channel(int c) const { return c; }
  REGKERNELS_HD int64_t at(int64_t voxel, int c) const { return voxel * D + c; }
};

// Calls body(channel) for each channel. Channels that lie last are few and their number is known to
// the compiler, which unrolls the loop. Of channels that lie first there is mostly one: the first
// is peeled off, so that its offset costs nothing. It is always there, as launches of empty results
// end early.
template <class Layout, class Body>
REGKERNELS_HD void for_each_channel(const Layout& layout, const Body& body) {
  if constexpr (Layout::kLast) {
    constexpr int kCount = Layout().count();
    REGKERNELS_UNROLL
    for (int channel = 0; channel < kCount; ++channel) body(channel);
  } else {
    body(IntTag<0>::value);
    REGKERNELS_NO_UNROLL
    for (int channel = 1; channel < layout.count(); ++channel) body(channel);
  }
}

}  // namespace regkernels
