// Cubic sampling of an array at the positions that an affine and a vector field give: what
// resampling.h is to linear sampling, and the samples. The gradients of what places the samples are
// those of linear sampling, with another derivative.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "maths/cubic.h"
#include "maths/voxel_vectors.h"
#include "resample/resampling.h"

namespace regkernels {

// `Plain` is a Resampling, of which this has everything but the samples.
template <class Plain>
struct CubicResampling : Plain {
  using S = typename Plain::S;
  using T = typename Plain::T;
  using Layout = typename Plain::Layout;
  static constexpr int D = Plain::D;
  static constexpr bool kSlab = Plain::kSlab;
  static constexpr bool kCubic = true;
  static constexpr bool kComputesNeighbours = false;

  using Taps = AxisTaps<T>[D];

  struct Element : Plain::Element {
    // Calls body(taps, IntTag<0>) for a sample to which no boundary rule applies, of whose taps
    // along an axis only the first index is set, and body(taps, IntTag<1>) for any other.
    template <class Body>
    REGKERNELS_HD auto sample(const Vec<T, D>& p, const Body& body) const {
      const auto& boundary = this->self->boundary;
      AxisTaps<T> taps[D];
      InnerTaps<T, D> inner;
      // A warp of which some samples are not inner ones would follow both paths.
      if (warp_agrees(find_inner_taps(p, boundary.size, inner) && answers(inner.first[D - 1]))) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          taps[k].index[0] = inner.first[k];
          tap_weights(boundary.sampling.mode, inner.fraction[k], taps[k].weight);
          tap_slopes(boundary.sampling.mode, inner.fraction[k], taps[k].slope);
        }
        return body(taps, IntTag<0>{});
      }
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        taps[k] = locate_taps(p[k], boundary.size[k], boundary.sampling);
      }
      answer(taps[D - 1]);
      return body(taps, IntTag<1>{});
    }

    // Whether the planes at hand answer for a sample with a plane at or below it. Where they are
    // more than those that answer, the first one is there for its neighbour above only.
    REGKERNELS_HD bool answers_for(int nearest) const {
      const SampledSlab& slab = this->self->slab;
      const int begin = this->first_sampled + (slab.planes > slab.answering ? 1 : 0);
      return unsigned(nearest - begin) < unsigned(slab.answering);
    }
    REGKERNELS_HD bool at_hand(int plane) const {
      return unsigned(plane - this->first_sampled) < unsigned(this->self->slab.planes);
    }
    // The same for a sample whose taps lie within the volume, from the plane `first` on.
    REGKERNELS_HD bool answers(int first) const {
      if constexpr (kSlab) {
        return answers_for(first + 1) && at_hand(first) && at_hand(first + kTaps - 1);
      }
      return true;
    }
    // Where the planes at hand do not answer for a sample, no tap counts. What does not count may
    // be read all the same.
    REGKERNELS_HD void answer(AxisTaps<T>& slow) const {
      if constexpr (kSlab) {
        bool answers = answers_for(slow.nearest);
        REGKERNELS_UNROLL
        for (int i = 0; i < kTaps; ++i) {
          const bool counts = slow.weight[i] != 0 || slow.slope[i] != 0;
          answers = answers & (!counts | at_hand(slow.index[i]));
        }
        REGKERNELS_UNROLL
        for (int i = 0; i < kTaps; ++i) {
          if (!answers) slow.weight[i] = slow.slope[i] = 0;
          if (!at_hand(slow.index[i])) slow.index[i] = this->first_sampled;
        }
      }
    }

    // Calls body(offset, j, k) for each row of taps along x: the offset of the tap with index 0 in
    // the checked case, that of the first tap otherwise, in voxels; j and k are the row's taps
    // along y and z, the latter 0 in 2-D.
    template <bool kChecked, class Body>
    REGKERNELS_HD void for_each_row(const Taps& taps, const Body& body) const {
      const auto& stride = this->self->stride;
      constexpr int kPlanes = D == 3 ? kTaps : 1;
      if constexpr (!kChecked) {
        int64_t plane = this->self->voxel_offset(first_voxel(taps));
        REGKERNELS_UNROLL
        for (int k = 0; k < kPlanes; ++k) {
          int64_t row = plane;
          REGKERNELS_UNROLL
          for (int j = 0; j < kTaps; ++j) {
            body(row, j, k);
            row += stride[1];
          }
          if constexpr (D == 3) plane += stride[D - 1];
        }
      } else {
        REGKERNELS_UNROLL
        for (int k = 0; k < kPlanes; ++k) {
          REGKERNELS_UNROLL
          for (int j = 0; j < kTaps; ++j) {
            int64_t row = taps[1].index[j] * stride[1];
            if constexpr (D == 3) row += taps[D - 1].index[k] * stride[D - 1];
            body(row, j, k);
          }
        }
      }
    }
    static REGKERNELS_HD Vec<int, D> first_voxel(const Taps& taps) {
      Vec<int, D> first;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) first[k] = taps[k].index[0];
      return first;
    }
    // The place of a tap along x in its row, in voxels.
    template <bool kChecked>
    static REGKERNELS_HD int along_x(const Taps& taps, int i) {
      return kChecked ? taps[0].index[i] : i;
    }
    // The factor that all taps of a row have in common: the product of their weights along y and z,
    // where the one along `axis`, if it is one of these, is replaced by the slope.
    static REGKERNELS_HD T row_factor(const Taps& taps, int j, int k, int axis = 0) {
      const T along_y = axis == 1 ? taps[1].slope[j] : taps[1].weight[j];
      if constexpr (D == 2) return along_y;
      return along_y * (axis == 2 ? taps[D - 1].slope[k] : taps[D - 1].weight[k]);
    }
    // Sums begin with a negative zero, to which any term may be added without a change: a sum of
    // one term is that term, a negative zero, too.
    static REGKERNELS_HD T no_terms() { return T(-0.0); }

    // What is 0 does not count, whatever it would be multiplied by: NaN times 0 is not 0. The taps
    // of a sample within the volume all count. There is no branch, so that loads do not wait for
    // one.
    template <bool kChecked>
    static REGKERNELS_HD void add_term(T factor, T value, T& sum) {
      const T more = product_plus(factor, value, sum);
      sum = !kChecked || factor != 0 ? more : sum;
    }

    template <bool kChecked>
    static REGKERNELS_HD T dot(const T (&weight)[kTaps], const T (&value)[kTaps]) {
      T sum = no_terms();
      REGKERNELS_UNROLL
      for (int i = 0; i < kTaps; ++i) add_term<kChecked>(weight[i], value[i], sum);
      return sum;
    }

    // Samples the channels that lie side by side, from `channel` on.
    template <bool kChecked>
    REGKERNELS_HD void values(const Taps& taps, int channel, T (&value)[Layout::kPixel]) const {
      const S* const data = this->input + this->self->in_layout.channel(channel);
      T line[Layout::kPixel][kTaps];
      begin_lines(line);
      bool any = !kChecked;
      for_each_row<kChecked>(taps, [&](int64_t offset, int j, int k) {
        const T factor = row_factor(taps, j, k);
        any = any | (factor != 0);
        const S* const row = data + offset * Layout::kPixel;
        add_row<kChecked>(
            factor,
            [&](int i, int c) {
              return to_arithmetic(row[along_x<kChecked>(taps, i) * Layout::kPixel + c]);
            },
            line);
      });
      if (kChecked)
        any = any & (taps[0].weight[0] != 0 || taps[0].weight[1] != 0 || taps[0].weight[2] != 0 ||
                     taps[0].weight[3] != 0);
      REGKERNELS_UNROLL
      for (int c = 0; c < Layout::kPixel; ++c) {
        // Where no tap counts, this is a positive zero.
        const T sum = dot<kChecked>(taps[0].weight, line[c]);
        value[c] = any ? sum : T(0);
      }
    }

    // The sums over rows, of each channel and tap along x: before the first row, and with one more,
    // of which tap(i, c) are the values.
    static REGKERNELS_HD void begin_lines(T (&line)[Layout::kPixel][kTaps]) {
      REGKERNELS_UNROLL
      for (int i = 0; i < kTaps; ++i) {
        REGKERNELS_UNROLL
        for (int c = 0; c < Layout::kPixel; ++c) line[c][i] = no_terms();
      }
    }
    template <bool kChecked, class Tap>
    static REGKERNELS_HD void add_row(T factor, const Tap& tap, T (&line)[Layout::kPixel][kTaps]) {
      REGKERNELS_UNROLL
      for (int i = 0; i < kTaps; ++i) {
        REGKERNELS_UNROLL
        for (int c = 0; c < Layout::kPixel; ++c) add_term<kChecked>(factor, tap(i, c), line[c][i]);
      }
    }

    // Adds, for each axis, what the derivative along it is the dot product of with the taps along
    // x: the sum over rows of the values of the channels that lie side by side, from `channel` on,
    // each weighted with its cotangent.
    template <bool kChecked>
    REGKERNELS_HD void add_lines(const Taps& taps, int channel, const S* grad,
                                 T (&line)[D][kTaps]) const {
      constexpr int kPixel = Layout::kPixel;
      const S* const data = this->input + this->self->in_layout.channel(channel);
      T g[kPixel];
      REGKERNELS_UNROLL
      for (int c = 0; c < kPixel; ++c) {
        g[c] = to_arithmetic(grad[this->self->out_layout.channel(channel + c)]);
      }
      for_each_row<kChecked>(taps, [&](int64_t offset, int j, int k) {
        const S* const row = data + offset * kPixel;
        T value[kTaps];
        REGKERNELS_UNROLL
        for (int i = 0; i < kTaps; ++i) {
          value[i] = 0;
          REGKERNELS_UNROLL
          for (int c = 0; c < kPixel; ++c) {
            const int place = along_x<kChecked>(taps, i) * kPixel + c;
            value[i] += g[c] * to_arithmetic(row[place]);
          }
        }
        REGKERNELS_UNROLL
        for (int axis = 0; axis < D; ++axis) {
          const T factor = row_factor(taps, j, k, axis);
          REGKERNELS_UNROLL
          for (int i = 0; i < kTaps; ++i) add_term<kChecked>(factor, value[i], line[axis][i]);
        }
      });
    }

    // As in Resampling.
    REGKERNELS_HD Vec<T, D> position_gradient(const Vec<T, D>& p, const S* grad) const {
      return sample(p, [&](const Taps& taps, auto checked) {
        constexpr bool kChecked = decltype(checked)::value;
        T line[D][kTaps] = {};
        if constexpr (Layout::kLast) {
          add_lines<kChecked>(taps, 0, grad, line);
        } else {
          for_each_channel(this->self->in_layout,
                           [&](auto channel) { add_lines<kChecked>(taps, channel, grad, line); });
        }
        Vec<T, D> gradient;
        gradient[0] = dot<kChecked>(taps[0].slope, line[0]);
        REGKERNELS_UNROLL
        for (int k = 1; k < D; ++k) gradient[k] = dot<kChecked>(taps[0].weight, line[k]);
        return gradient;
      });
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t n) const {
    Element result;
    static_cast<typename Plain::Element&>(result) = Plain::element(group, n);
    return result;
  }
};

// The samples: what a forward op returns.
template <class R>
struct CubicForward {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = 4;
  static constexpr int kUnroll = 1;
  static constexpr int kMinBlocks = sizeof(T) == sizeof(double) ? 1 : 3;

  R resampling;
  Operand<S> output;
  bool add_field;  // output = field + sample, where channels are last

  struct Element {
    typename R::Element source;
    const CubicForward* self;
    S* output;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const R& r = self->resampling;
      const Vec<T, D> u = source.vector(voxel);
      const Vec<T, D> p = source.position(voxel, u);
      source.sample(p, [&](const auto& taps, auto checked) {
        const int channels = R::Layout::kLast ? 1 : r.in_layout.count();
        REGKERNELS_NO_UNROLL
        for (int channel = 0; channel < channels; ++channel) {
          T value[R::Layout::kPixel];
          source.template values<decltype(checked)::value>(taps, channel, value);
          store(voxel, u, channel, value);
        }
      });
    }

    // Writes the samples of the channels that lie side by side, from `channel` on, at a voxel whose
    // vector is u. Every lane of the warp must take part.
    REGKERNELS_HD void store(const Voxel& voxel, const Vec<T, D>& u, int channel,
                             const T (&value)[R::Layout::kPixel]) const {
      const R& r = self->resampling;
      if constexpr (R::Layout::kLast) {
        Vec<T, D> sum;
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) sum[k] = value[k] + (self->add_field ? u[k] : T(0));
        store_packed(output + voxel.row(r.map.out.size) * D, voxel, sum);
      } else if (voxel.active) {
        source.template out_pointer<1>(output, voxel)[r.out_layout.channel(channel)] =
            to_storage<S>(value[0]);
      }
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, opaque_pointer(output.at(group, item))};
  }
};

}  // namespace regkernels
