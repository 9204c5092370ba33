// Sampling one array at the positions that an affine and a vector field give, and the gradients of
// that. `interpolate` (images, channels first) and `compose` (fields, channels last) are both this.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "core/reduce.h"
#include "maths/coordinates.h"
#include "maths/sampling.h"
#include "resample/fixed_point.h"
#include "resample/neighbours.h"

namespace regkernels {

// How an array of voxels with channels lies in memory: kPixel elements from one voxel to the next,
// at(voxel, channel) is an element's offset, channel(c) that of a voxel's channel from its first.
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

// Calls body(channel). Channels that lie last are few and known to the compiler, which unrolls.
// Those that lie first are mostly one: it is peeled off, so that its offset costs nothing. There
// always is one: see resample_forward.
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

// kField is false where an affine alone places the samples: then most of a position is the same for
// all voxels along z, and the compiler sees it.
//
// The array that is sampled, the result and its cotangent are stored as S; everything else, and all
// arithmetic, is T.
template <class Storage, class Compute, int kD, bool kHasAffine, bool kHasField, class InLayout>
struct Resampling {
  using S = Storage;
  using T = Compute;
  static constexpr int D = kD;
  static constexpr bool kAffine = kHasAffine;
  static constexpr bool kField = kHasField;
  using Layout = InLayout;
  using Map = PositionMap<T, D, kAffine>;

  Map map;
  Boundary<T, D> boundary;
  int64_t stride[D];  // of the input, in voxels
  int64_t step[D];    // of the input, in bytes
  Layout in_layout;
  Layout out_layout;
  Operand<const S> input;
  Operand<const T> affine;
  Operand<const T> field;

  // One batch element, ready to be asked for positions.
  struct Element {
    const Resampling* self;
    const S* input;
    const T* field;
    typename Map::Item item;

    // An output voxel's place in an array of kPixel elements a voxel.
    template <int kPixel, class Value>
    REGKERNELS_HD Value* out_pointer(Value* base, const Voxel& voxel) const {
      const auto& size = self->map.out.size;
      return voxel_pointer<kPixel>(base, voxel.z * size[1] + voxel.y, size[0], voxel.x);
    }
    REGKERNELS_HD int64_t voxel_offset(const Voxel& voxel) const {
      return voxel.row(self->map.out.size) + voxel.x;
    }
    REGKERNELS_HD Vec<T, D> vector(const Voxel& voxel) const {
      if (!kField || field == nullptr) return Vec<T, D>{};
      return load_vec<T, D>(out_pointer<D>(field, voxel));
    }
    REGKERNELS_HD Vec<T, D> position(const Voxel& voxel, const Vec<T, D>& u) const {
      return self->map.template position<kField>(item, voxel.index<D>(), u);
    }
    // Values at the corners, each what `convert` makes of what is stored; `kChecked`: of a cell
    // that may lie partly outside, where they are `outside`.
    template <bool kChecked, class Value, class Convert>
    REGKERNELS_HD void load_corners(const Cell<T, D>& cell, int channel, Value outside,
                                    const Convert& convert, Value (&value)[1 << D]) const {
      const auto& size = self->map.in.size;
      constexpr int kRows = 1 << (D - 1);
      const S* row[kRows];
      row[0] = voxel_pointer<Layout::kPixel>(input + self->in_layout.channel(channel),
                                             self->row_number(cell.index), size[0], cell.index[0]);
      bool row_inside[kRows] = {true};
      REGKERNELS_UNROLL
      for (int k = 1; k < D; ++k) {
        const bool lower = unsigned(cell.index[k]) < unsigned(size[k]);
        const bool upper = cell.index[k] + 1u < unsigned(size[k]);
        REGKERNELS_UNROLL
        for (int i = 0; i < 1 << (k - 1); ++i) {
          const int next = i | 1 << (k - 1);
          row[next] = advance_bytes(row[i], self->step[k]);
          row_inside[next] = row_inside[i] & upper;
          row_inside[i] = row_inside[i] & lower;
        }
      }
      const bool lower = unsigned(cell.index[0]) < unsigned(size[0]);
      const bool upper = cell.index[0] + 1u < unsigned(size[0]);
      REGKERNELS_UNROLL
      for (int i = 0; i < kRows; ++i) {
        value[2 * i] = value[2 * i + 1] = outside;
        if (!kChecked || (row_inside[i] & lower)) value[2 * i] = convert(row[i][0]);
        if (!kChecked || (row_inside[i] & upper)) {
          value[2 * i + 1] = convert(row[i][Layout::kPixel]);
        }
      }
    }
    template <bool kChecked>
    REGKERNELS_HD void load_corners(const Cell<T, D>& cell, int channel, T (&value)[1 << D]) const {
      load_corners<kChecked>(
          cell, channel, T(0), [](S stored) { return to_arithmetic(stored); }, value);
    }

    // Calls take(cell, IntTag<0>, unused) for a sample to which no boundary rule applies and
    // take(cell, IntTag<1>, slope) for any other. A warp whose samples are not all inner ones takes
    // them all as if they were not: it would have to follow both paths anyway. Either gives the
    // same.
    template <class Take>
    REGKERNELS_HD auto sample(const Vec<T, D>& p, const Take& take) const {
      Cell<T, D> cell;
      Vec<T, D> slope{};
      if (warp_agrees(self->boundary.find_inner_cell(p, cell))) {
        return take(cell, IntTag<0>{}, slope);
      }
      cell = self->boundary.find_cell(p, slope);
      return take(cell, IntTag<1>{}, slope);
    }

    // The weights of the corners, 0 where one lies outside; returns the voxel of corner 0.
    REGKERNELS_HD Vec<int, D> corner_weights(const Vec<T, D>& p, T (&weight)[1 << D]) const {
      Cell<T, D> cell;
      if (self->boundary.find_inner_cell(p, cell)) {
        REGKERNELS_UNROLL
        for (int i = 0; i < (1 << D); ++i) weight[i] = cell.weight(i);
        return cell.index;
      }
      Vec<T, D> slope;
      cell = self->boundary.find_cell(p, slope);
      REGKERNELS_UNROLL
      for (int i = 0; i < (1 << D); ++i) {
        weight[i] = cell.inside(i, self->map.in.size) ? cell.weight(i) : T(0);
      }
      return cell.index;
    }

    // Gradient with respect to the position, of the channels weighted with their cotangents, which
    // begin at `grad`.
    REGKERNELS_HD Vec<T, D> position_gradient(const Vec<T, D>& p, const S* grad) const {
      return sample(p, [&](const Cell<T, D>& cell, auto checked, const Vec<T, D>& slope) {
        constexpr bool kChecked = decltype(checked)::value;
        // For each corner, the sum over channels of cotangent times value.
        Vec<T, 1 << D> dot{};
        for_each_channel(self->in_layout, [&](auto channel) {
          const T g = to_arithmetic(grad[self->out_layout.channel(channel)]);
          T value[1 << D];
          load_corners<kChecked>(cell, channel, value);
          REGKERNELS_UNROLL
          for (int corner = 0; corner < (1 << D); ++corner) dot[corner] += g * value[corner];
        });
        Vec<T, D> gradient = sample_gradient<kChecked>(cell, dot.v);
        if (kChecked) {
          REGKERNELS_UNROLL
          for (int k = 0; k < D; ++k) gradient[k] = slope[k] == 0 ? T(0) : slope[k] * gradient[k];
        }
        return gradient;
      });
    }
  };

  // Row numbers fit 32 bits (checked), their products with the row length may not.
  REGKERNELS_HD int row_number(const Vec<int, D>& index) const {
    int row = index[D - 1];
    REGKERNELS_UNROLL
    for (int k = D - 2; k > 0; --k) row = row * map.in.size[k] + index[k];
    return row;
  }
  REGKERNELS_HD int64_t voxel_offset(const Vec<int, D>& index) const {
    return static_cast<int64_t>(row_number(index)) * map.in.size[0] + index[0];
  }
  REGKERNELS_HD int64_t corner_offset(int corner) const {
    int64_t offset = 0;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) offset += corner >> k & 1 ? stride[k] : 0;
    return offset;
  }

  // How far the corners of a cell are from corner 0, in elements.
  template <int kPixel>
  Vec<int64_t, 1 << D> corner_elements() const {
    Vec<int64_t, 1 << D> result;
    for (int corner = 0; corner < (1 << D); ++corner) {
      result[corner] = corner_offset(corner) * kPixel;
    }
    return result;
  }

  REGKERNELS_HD Element element(int64_t group, int64_t n) const {
    Element result;
    result.self = this;
    result.input = settled(input.at(group, n));
    result.field = !kField || field.data == nullptr ? nullptr : settled(field.at(group, n));
    result.item = map.item(kAffine ? affine.at(group, n) : nullptr);
    return result;
  }
};

template <class R>
struct ResampleForward {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = R::kField ? 8 : 16;
  static constexpr int kUnroll = 1;
  static constexpr int kMinBlocks = R::kAffine || R::Layout::kLast ? 5 : 6;

  R resampling;
  Operand<S> output;
  bool add_field;  // channels last only: output = field + sample

  struct Element {
    typename R::Element source;
    const ResampleForward* self;
    S* output;

    // Calls store(channel, value) for each channel.
    template <class Store>
    REGKERNELS_HD void sample(const Vec<T, D>& p, const Store& store) const {
      source.sample(p, [&](const Cell<T, D>& cell, auto checked, const Vec<T, D>&) {
        constexpr bool kChecked = decltype(checked)::value;
        for_each_channel(self->resampling.in_layout, [&](auto channel) {
          T value[1 << D];
          source.template load_corners<kChecked>(cell, channel, value);
          store(channel, sample_value<kChecked>(cell, value));
        });
      });
    }

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const R& r = self->resampling;
      const Vec<T, D> u = source.vector(voxel);
      const Vec<T, D> p = source.position(voxel, u);
      if constexpr (R::Layout::kLast) {
        Vec<T, D> value;
        sample(p, [&](auto k, T sampled) { value[k] = sampled + (self->add_field ? u[k] : T(0)); });
        store_packed(output + voxel.row(r.map.out.size) * D, voxel, value);
      } else {
        S* target = source.template out_pointer<1>(output, voxel);
        sample(p, [&](auto channel, T sampled) {
          if (voxel.active) target[r.out_layout.channel(channel)] = to_storage<S>(sampled);
        });
      }
    }

    static constexpr bool kTakesRows = std::is_same_v<S, T>;
    void row(int z, int y, int size) const {
      const auto one = [&](int x) { take_one(*this, Voxel{z, y, x, true, x, size}); };
      const auto take = [&](const Neighbours<R, true>& near, const Voxel& first, auto checked) {
        sample_neighbours<decltype(checked)::value>(near, first);
      };
      take_row<R, true>(source, z, y, size, take, one);
    }

    template <bool kChecked>
    void sample_neighbours(const Neighbours<R, true>& near, const Voxel& first) const {
      const R& r = self->resampling;
      constexpr int kPixel = R::Layout::kPixel;
      const auto corner = r.template corner_elements<kPixel>();
      const T* field = nullptr;
      if constexpr (R::kField) field = source.template out_pointer<D>(source.field, first);
      S* const pixel = source.template out_pointer<kPixel>(output, first);
      [[maybe_unused]] const bool add = R::Layout::kLast && self->add_field;
      for_each_channel(r.in_layout, [&](auto channel) {
        const S* const input = source.input + r.in_layout.channel(channel);
        S* const target = pixel + r.out_layout.channel(channel);
#pragma GCC ivdep
        for (int i = 0; i < near.kCount; ++i) {
          T value[1 << D];
          for (int k = 0; k < (1 << D); ++k) value[k] = input[near.offset[i] + corner[k]];
          const T sampled = sample_value<kChecked>(near.cell(i), value);
          if constexpr (R::Layout::kLast) {
            target[i * kPixel] = sampled + (add ? field[i * D + static_cast<int>(channel)] : T(0));
          } else {
            target[i] = sampled;
          }
        }
      });
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, settled(output.at(group, item))};
  }
};

// The gradient with respect to the field. A field shared by all items (`shared_items` > 1) sums
// over them here, in one thread, so that nobody else writes to it.
template <class R>
struct FieldGradient {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = 4;
  static constexpr int kUnroll = 1;
  static constexpr int kMinBlocks = R::kAffine ? 3 : 4;

  R resampling;
  Operand<const S> grad_output;
  Operand<T> grad_field;
  bool add_field;
  int64_t shared_items;  // 1, or the number of items that share the field

  struct Element {
    typename R::Element first;
    const FieldGradient* self;
    int64_t group, item;

    REGKERNELS_HD void add_item(const typename R::Element& source, int64_t n, const Voxel& voxel,
                                Vec<T, D>& total) const {
      const S* grad =
          source.template out_pointer<R::Layout::kPixel>(self->grad_output.at(group, n), voxel);
      const Vec<T, D> p = source.position(voxel, source.vector(voxel));
      const Vec<T, D> grad_u =
          self->resampling.map.pull_back(source.item, source.position_gradient(p, grad));
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        total[k] += grad_u[k];
        if constexpr (R::Layout::kLast) {
          if (self->add_field) total[k] += to_arithmetic(grad[k]);
        }
      }
    }

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      Vec<T, D> total{};
      add_item(first, item, voxel, total);
      REGKERNELS_NO_UNROLL
      for (int64_t n = 1; n < self->shared_items; ++n) {
        add_item(self->resampling.element(group, n), n, voxel, total);
      }
      store_packed(self->grad_field.at(group, item) + voxel.row(self->resampling.map.out.size) * D,
                   voxel, total);
    }

    static constexpr bool kTakesRows = std::is_same_v<S, T>;
    void row(int z, int y, int size) const {
      const auto one = [&](int x) { take_one(*this, Voxel{z, y, x, true, x, size}); };
      const bool few_channels = R::Layout::kLast || self->resampling.in_layout.count() == 1;
      if (few_channels && self->shared_items == 1) {
        const auto take = [&](const Neighbours<R, false>& near, const Voxel& voxel, auto checked) {
          store_neighbours<decltype(checked)::value>(near, voxel);
        };
        take_row<R, false>(first, z, y, size, take, one);
      } else {
        for (int x = 0; x < size; ++x) one(x);
      }
    }

    // Of one item, and of one channel or those that lie last.
    template <bool kChecked>
    void store_neighbours(const Neighbours<R, false>& near, const Voxel& voxel) const {
      const R& r = self->resampling;
      constexpr int kPixel = R::Layout::kPixel;
      const auto corner = r.template corner_elements<kPixel>();
      const S* const grad =
          first.template out_pointer<kPixel>(self->grad_output.at(group, item), voxel);
      T* const target = first.template out_pointer<D>(self->grad_field.at(group, item), voxel);
      const typename R::Map::Item map_item = first.item;
      const S* const input = first.input;
      [[maybe_unused]] const bool add = R::Layout::kLast && self->add_field;
      with_known_placement(r, [&](const auto& map) {
#pragma GCC ivdep
        for (int i = 0; i < near.kCount; ++i) {
          T dot[1 << D] = {};
          for (int c = 0; c < kPixel; ++c) {
            for (int k = 0; k < (1 << D); ++k) {
              dot[k] += grad[i * kPixel + c] * input[near.offset[i] + corner[k] + c];
            }
          }
          const Vec<T, D> grad_u =
              map.pull_back(map_item, sample_gradient<kChecked>(near.cell(i), dot));
          for (int k = 0; k < D; ++k) {
            T total = T(0) + grad_u[k];  // as the sum over items begins
            if constexpr (R::Layout::kLast) total += add ? grad[i * kPixel + k] : T(0);
            target[i * D + k] = total;
          }
        }
      });
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, group, item};
  }
};

// The sums over voxels that the gradient of an affine is made of: for each row j of the affine,
// grad_p[j] * q[k] and grad_p[j] itself, with q what the matrix acts on (see PositionMap::source).
template <class R>
struct AffineMoments {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kSums = D * (D + 1);
  static constexpr int kMinBlocks = 4;

  R resampling;
  Operand<const S> grad_output;

  struct Element {
    typename R::Element source;
    const AffineMoments* self;
    const S* grad;

    REGKERNELS_HD void operator()(const Voxel& voxel, T (&sums)[kSums]) const {
      const R& r = self->resampling;
      const Vec<T, D> u = source.vector(voxel);
      const Vec<T, D> grad_p = source.position_gradient(
          source.position(voxel, u), source.template out_pointer<R::Layout::kPixel>(grad, voxel));
      const Vec<T, D> q = r.map.template source<R::kField>(voxel.index<D>(), u);
      REGKERNELS_UNROLL
      for (int j = 0; j < D; ++j) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          // Where a displacement is not finite, the sample is outside and its gradient 0.
          const bool counts = !R::kField || grad_p[j] != 0;
          sums[j * (D + 1) + k] += counts ? grad_p[j] * q[k] : T(0);
        }
        sums[j * (D + 1) + D] += grad_p[j];
      }
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, settled(grad_output.at(group, item))};
  }

  // From a sum to the gradient of entry (j, k), in normalised units.
  REGKERNELS_HD double scale(int entry) const {
    const int j = entry / (D + 1), k = entry % (D + 1);
    const double half = resampling.map.in.half[j];
    return k == D ? half : half * resampling.map.out.inverse[k];
  }
};

// Memory for the gradient of the array that is sampled.
struct ScatterWorkspace {
  const Tensor* row_bounds = nullptr;  // CPU: the rows of the target that a row of voxels reaches
  const Tensor* sums = nullptr;        // absent where the gradient itself can be added up in
  const Tensor* fixed_sums = nullptr;  // these two: only where the result must not vary
  const Tensor* largest = nullptr;
};

// ---- Scatter on the CPU -------------------------------------------------------------------------
//
// Each task owns a slab of the target (along its slowest axis) and walks over all source rows in
// order, so every target voxel receives its contributions in the same order however the target is
// cut: the result does not depend on the number of threads. A first pass notes for each source row
// which slabs it can reach, so that a task skips the rows of others.

// Adds one voxel's contributions, as far as they fall on [low, high) of the slowest axis.
template <class R>
inline void scatter_voxel(const R& resampling, const typename R::Element& source,
                          const Voxel& voxel, int low, int high, const typename R::S* grad,
                          typename R::T* target) {
  using T = typename R::T;
  constexpr int D = R::D;
  const Vec<T, D> p = source.position(voxel, source.vector(voxel));
  const int slow =
      locate(p[D - 1], resampling.map.in.size[D - 1], resampling.boundary.sampling).index;
  if (slow + 1 < low || slow >= high) return;
  T weight[1 << D];
  int64_t offset[1 << D];
  const int64_t base = resampling.voxel_offset(source.corner_weights(p, weight));
  bool full = true;
  for (int corner = 0; corner < (1 << D); ++corner) {
    const int index = slow + (corner >> (D - 1) & 1);
    if (index < low || index >= high) weight[corner] = 0;
    full = full && weight[corner] != 0;
    offset[corner] = base + resampling.corner_offset(corner);
  }
  const int64_t here = source.voxel_offset(voxel);
  for (int channel = 0; channel < resampling.in_layout.count(); ++channel) {
    const T g = to_arithmetic(grad[resampling.out_layout.at(here, channel)]);
    if (full) {
      for (int corner = 0; corner < (1 << D); ++corner) {
        target[resampling.in_layout.at(offset[corner], channel)] += weight[corner] * g;
      }
    } else {
      for (int corner = 0; corner < (1 << D); ++corner) {
        if (weight[corner] == 0) continue;
        target[resampling.in_layout.at(offset[corner], channel)] += weight[corner] * g;
      }
    }
  }
}

template <class R>
void scatter(const Cpu&, const VoxelSpace& space, const R& resampling, const Tensor& grad_output,
             const Tensor& grad_input, const ScatterWorkspace& workspace) {
  using S = typename R::S;
  using T = typename R::T;
  constexpr int D = R::D;
  const Operand<const S> grad_operand(grad_output);
  int32_t* row_bounds = workspace.row_bounds->as<int32_t>();
  const int64_t rows = space.rows();
  const int slow_size = resampling.map.in.size[D - 1];

  auto voxel_at = [&](int64_t row, int x) {
    return Voxel{
        static_cast<int>(row / space.y), static_cast<int>(row % space.y), x, true, x, space.x};
  };

  auto find_bounds = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / rows;
      const auto source = resampling.element(b / space.items, b % space.items);
      int32_t low = INT32_MAX, high = INT32_MIN;
      for (int x = 0; x < space.x; ++x) {
        const Voxel voxel = voxel_at(i - b * rows, x);
        const Vec<T, D> p = source.position(voxel, source.vector(voxel));
        const int index = locate(p[D - 1], slow_size, resampling.boundary.sampling).index;
        low = std::min(low, index);
        high = std::max(high, index + 1);
      }
      row_bounds[2 * i] = low;
      row_bounds[2 * i + 1] = high;
    }
  };
  parallel_for(space.batch() * rows, std::max<int64_t>(1, 4096 / space.x), find_bounds);

  int64_t slow_stride = 1;
  for (int k = 0; k + 1 < D; ++k) slow_stride *= resampling.map.in.size[k];
  const int64_t targets = grad_input.shape[0] * grad_input.shape[1];
  const bool shared_input = grad_input.shape[1] != space.items;
  const Operand<T> target_operand(grad_input);
  const int64_t pieces =
      std::min<int64_t>(slow_size, targets >= 2 * num_threads() ? 1 : 2 * num_threads());
  const int64_t slab = (slow_size + pieces - 1) / pieces;

  auto fill_slabs = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t target_index = task / pieces;
      const int64_t group = target_index / grad_input.shape[1];
      const int64_t target_item = target_index % grad_input.shape[1];
      const int low = static_cast<int>(std::min<int64_t>(task % pieces * slab, slow_size));
      const int high = static_cast<int>(std::min<int64_t>(low + slab, slow_size));
      T* target = target_operand.at(group, target_item);
      for (int channel = 0; channel < resampling.in_layout.count(); ++channel) {
        for (int64_t v = low * slow_stride; v < high * slow_stride; ++v) {
          target[resampling.in_layout.at(v, channel)] = 0;
        }
      }
      const int64_t first = shared_input ? 0 : target_item;
      const int64_t last = shared_input ? space.items : target_item + 1;
      for (int64_t n = first; n < last; ++n) {
        const auto source = resampling.element(group, n);
        const S* grad = grad_operand.at(group, n);
        const int32_t* bounds = row_bounds + 2 * (group * space.items + n) * rows;
        for (int64_t row = 0; row < rows; ++row) {
          if (bounds[2 * row + 1] < low || bounds[2 * row] >= high) continue;
          for (int x = 0; x < space.x; ++x) {
            scatter_voxel(resampling, source, voxel_at(row, x), low, high, grad, target);
          }
        }
      }
    }
  };
  parallel_for(targets * pieces, 1, fill_slabs);
}

#ifdef __CUDACC__

// ---- Scatter on CUDA ----------------------------------------------------------------------------
//
// A block of voxels adds, by way of a warp that does not vary much, to a block of targets of about
// the same size. It accumulates them in shared memory, in a tile placed about where its central
// voxel goes, and then adds each touched target to global memory once, in whole rows. What falls
// outside the tile goes to global memory directly: a wild warp is slower, not wrong.

template <class T, int D>
struct ScatterShape;
template <class T>
struct ScatterShape<T, 3> {
  static constexpr int kBlockX = 16, kBlockY = 8, kBlockZ = sizeof(T) == 4 ? 8 : 2;
  static constexpr int kTileX = 22, kTileY = 14, kTileZ = sizeof(T) == 4 ? 12 : 6;
};
template <class T>
struct ScatterShape<T, 2> {
  static constexpr int kBlockX = 32, kBlockY = 32, kBlockZ = 1;
  static constexpr int kTileX = 44, kTileY = 44, kTileZ = 1;
};
inline constexpr int kScatterThreads = 256;

template <class R>
__global__ void __launch_bounds__(kScatterThreads, 4)
    scatter_kernel(const __grid_constant__ R resampling,
                   const __grid_constant__ Operand<const typename R::S> grad_output,
                   const __grid_constant__ Operand<typename R::T> grad_input,
                   const __grid_constant__ VoxelSpace space, int tiles_x) {
  using T = typename R::T;
  constexpr int D = R::D;
  using Shape = ScatterShape<T, D>;
  constexpr int kChannels = R::Layout::kLast ? D : 1;  // accumulated at a time
  constexpr int kTileSize[3] = {Shape::kTileX, Shape::kTileY, Shape::kTileZ};
  constexpr int kTileStride[3] = {1, Shape::kTileX, Shape::kTileX * Shape::kTileY};
  constexpr int kTile = Shape::kTileX * Shape::kTileY * Shape::kTileZ * kChannels;
  constexpr int kRow = Shape::kTileX * kChannels;
  constexpr int kBlockVoxels = Shape::kBlockX * Shape::kBlockY * Shape::kBlockZ;
  static_assert(kTile % 4 == 0);
  __shared__ alignas(16) T tile[kTile];
  __shared__ int shared_origin[D];

  const int tile_y = blockIdx.x / tiles_x, tile_x = blockIdx.x - tile_y * tiles_x;
  const int x0 = tile_x * Shape::kBlockX, y0 = tile_y * Shape::kBlockY;
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    const int64_t group = space.items == 1 ? b : b / space.items;
    const int64_t item = space.items == 1 ? 0 : b - group * space.items;
    const auto source = resampling.element(group, item);
    const typename R::S* grad = grad_output.at(group, item);
    T* target = grad_input.at(group, item);
    for (int z0 = blockIdx.y * Shape::kBlockZ; z0 < space.z; z0 += gridDim.y * Shape::kBlockZ) {
      if (threadIdx.x == 0) {
        const int x = min(x0 + Shape::kBlockX / 2, space.x - 1);
        const Voxel centre{min(z0 + Shape::kBlockZ / 2, space.z - 1),
                           min(y0 + Shape::kBlockY / 2, space.y - 1),
                           x,
                           true,
                           x,
                           space.x};
        T unused[1 << D];
        const Vec<int, D> middle =
            source.corner_weights(source.position(centre, source.vector(centre)), unused);
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) shared_origin[k] = middle[k] - (kTileSize[k] / 2 - 1);
      }
#pragma unroll 1
      for (int channel = 0; channel < resampling.in_layout.count(); channel += kChannels) {
        for (int i = 4 * threadIdx.x; i < kTile; i += 4 * kScatterThreads) {
          REGKERNELS_UNROLL
          for (int j = 0; j < 4; ++j) tile[i + j] = 0;
        }
        __syncthreads();
        Vec<int, D> origin;  // the first voxel of the tile
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) origin[k] = shared_origin[k];

#pragma unroll 1
        for (int i = threadIdx.x; i < kBlockVoxels; i += kScatterThreads) {
          const int x = x0 + i % Shape::kBlockX;
          const int y = y0 + i / Shape::kBlockX % Shape::kBlockY;
          const int z = z0 + i / (Shape::kBlockX * Shape::kBlockY);
          if (x >= space.x || y >= space.y || z >= space.z) continue;
          const Voxel voxel{z, y, x, true, x, space.x};
          const Vec<T, D> p = source.position(voxel, source.vector(voxel));
          const int64_t here = source.voxel_offset(voxel);
          T g[kChannels], weight[1 << D];
          REGKERNELS_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            g[c] = to_arithmetic(grad[resampling.out_layout.at(here, channel + c)]);
          }
          const Vec<int, D> cell = source.corner_weights(p, weight);
          int in_tile = 0;
          bool fits = true;
          REGKERNELS_UNROLL
          for (int k = 0; k < D; ++k) {
            const int offset = cell[k] - origin[k];
            fits = fits & (offset >= 0) & (offset < kTileSize[k] - 1);
            in_tile += offset * kTileStride[k];
          }
          if (fits) {
            T* corner0 = tile + in_tile * kChannels;
            REGKERNELS_UNROLL
            for (int corner = 0; corner < (1 << D); ++corner) {
              if (weight[corner] == 0) continue;
              int step = 0;
              REGKERNELS_UNROLL
              for (int k = 0; k < D; ++k) step += corner >> k & 1 ? kTileStride[k] : 0;
              REGKERNELS_UNROLL
              for (int c = 0; c < kChannels; ++c) {
                atomicAdd(corner0 + step * kChannels + c, weight[corner] * g[c]);
              }
            }
          } else {
            const int64_t corner0 = resampling.voxel_offset(cell);
            REGKERNELS_UNROLL
            for (int corner = 0; corner < (1 << D); ++corner) {
              if (weight[corner] == 0) continue;
              T* place = target + resampling.in_layout.at(
                                      corner0 + resampling.corner_offset(corner), channel);
              REGKERNELS_UNROLL
              for (int c = 0; c < kChannels; ++c) atomicAdd(place + c, weight[corner] * g[c]);
            }
          }
        }
        __syncthreads();

        // Row by row, a warp each. What was not touched is 0, and may lie outside of the array.
        for (int row = threadIdx.x / kWarp; row < Shape::kTileY * Shape::kTileZ;
             row += kScatterThreads / kWarp) {
          Vec<int, D> first = origin;
          first[1] += row % Shape::kTileY;
          if constexpr (D == 3) first[2] += row / Shape::kTileY;
          T* start = target + resampling.in_layout.at(resampling.voxel_offset(first), channel);
          REGKERNELS_UNROLL
          for (int e = 0; e < kRow; e += kWarp) {
            const int element = e + threadIdx.x % kWarp;
            const T value = element < kRow ? tile[row * kRow + element] : T(0);
            if (value != 0) atomicAdd(start + element, value);
          }
        }
        __syncthreads();
      }
    }
  }
}

template <class R>
void scatter(const Cuda& device, const VoxelSpace& space, const R& resampling,
             const Tensor& grad_output, const Tensor& grad_input,
             const ScatterWorkspace& workspace) {
  if (workspace.fixed_sums->present) {
    return scatter_in_fixed_point(device, space, resampling, grad_output, grad_input,
                                  *workspace.fixed_sums, *workspace.largest);
  }
  using Shape = ScatterShape<typename R::T, R::D>;
  clear(device, grad_input);
  if (space.batch() == 0) return;
  const int64_t tiles_x = (space.x + Shape::kBlockX - 1) / Shape::kBlockX;
  const int64_t tiles_y = (space.y + Shape::kBlockY - 1) / Shape::kBlockY;
  const int64_t tiles_z = (space.z + Shape::kBlockZ - 1) / Shape::kBlockZ;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(tiles_z, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  scatter_kernel<<<grid, kScatterThreads, 0, device.stream>>>(
      resampling, Operand<const typename R::S>(grad_output), Operand<typename R::T>(grad_input),
      space, static_cast<int>(tiles_x));
  check_launch();
}

#endif

// ---- Gradients in half precision ----------------------------------------------------------------

// An image gradient, added up as T, to how it is stored.
template <class Storage>
struct RoundImage {
  using S = Storage;
  using T = Arithmetic<S>;
  const T* sums;
  S* image;
  int rows;  // along y
  int64_t volume;

  struct Element {
    const RoundImage* self;
    int64_t start;
    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const int64_t row = voxel.z * self->rows + voxel.y;
      const int64_t i = start + row * voxel.row_size + voxel.x;
      if (voxel.active) self->image[i] = to_storage<S>(self->sums[i]);
    }
  };
  REGKERNELS_HD Element element(int64_t volumes, int64_t) const { return {this, volumes * volume}; }
};

template <class S, class Device>
void round_image(const Device& device, const Tensor& sums, const Tensor& image) {
  const Sizes sizes = image_sizes(image);
  const int64_t volumes = image.shape[0] * image.shape[1] * image.shape[2];
  for_each_voxel(device, voxel_space(volumes, 1, sizes),
                 RoundImage<S>{sums.as<Arithmetic<S>>(), image.as<S>(), static_cast<int>(sizes.y),
                               sizes.voxels()});
}

// ---- Launches -----------------------------------------------------------------------------------

// Everything that a call needs to know, independent of dtype and dimensions.
struct ResampleCall {
  const Tensor* input = nullptr;
  const Tensor* affine = nullptr;
  const Tensor* field = nullptr;
  Sizes in_sizes;
  Sizes out_sizes;
  int dimensions = 3;
  Placement placement = Placement::kAffineFirst;
  Sampling sampling;
  bool channels_last = false;
  bool add_field = false;
  int64_t groups = 1;
  int64_t items = 1;
  // Gradients only.
  const Tensor* grad_output = nullptr;
  const Tensor* grad_input = nullptr;
  const Tensor* grad_affine = nullptr;
  const Tensor* grad_field = nullptr;
  ScatterWorkspace scatter;
  const Tensor* partial_sums = nullptr;
};

template <class S, class T, int D, bool kAffine, bool kField, class Layout>
Resampling<S, T, D, kAffine, kField, Layout> make_resampling(const ResampleCall& call,
                                                             Layout in_layout, Layout out_layout) {
  Resampling<S, T, D, kAffine, kField, Layout> r;
  const int64_t in[3] = {call.in_sizes.x, call.in_sizes.y, call.in_sizes.z};
  const int64_t out[3] = {call.out_sizes.x, call.out_sizes.y, call.out_sizes.z};
  r.map.placement = call.placement;
  r.map.in = make_frame<T, D>(in, call.sampling.align_corners);
  r.map.out = make_frame<T, D>(out, call.sampling.align_corners);
  for (int k = 0; k < D; ++k) {
    r.map.ratio[k] = in[k] == out[k] ? T(1) : r.map.in.half[k] * r.map.out.inverse[k];
    // An absent affine is the identity. In A (x + u) it is the output point that u displaces, which
    // has nowhere to go along an axis without extent; without a matrix only this factor meets u.
    const bool stuck = !kAffine && call.placement == Placement::kAffineLast;
    if (stuck && r.map.out.half[k] == 0) r.map.in.half[k] = 0;
  }
  r.boundary = make_boundary<T, D>(in, call.sampling);
  for (int k = 0; k < D; ++k) {
    r.stride[k] = k == 0 ? 1 : r.stride[k - 1] * in[k - 1];
    r.step[k] = r.stride[k] * Layout::kPixel * static_cast<int64_t>(sizeof(S));
  }
  r.in_layout = in_layout;
  r.out_layout = out_layout;
  r.input = Operand<const S>(*call.input);
  if (kAffine) r.affine = Operand<const T>(*call.affine);
  r.field = Operand<const T>(*call.field);
  return r;
}

// Calls body(resampling) with the concrete type for this call, of an array stored as S and
// arithmetic in T.
template <bool kChannelsLast, class S, class T, class Body>
void with_stored(const ResampleCall& call, const Body& body) {
  dispatch_dimensions(call.dimensions, [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    const bool affine = call.affine->present && call.placement != Placement::kFull;
    dispatch_bool(affine, [&](auto has_affine) {
      constexpr bool kAffine = decltype(has_affine)::value;
      if constexpr (kChannelsLast) {
        body(make_resampling<S, T, D, kAffine, true>(call, ChannelsLast<D>{}, ChannelsLast<D>{}));
      } else {
        const int channels = static_cast<int>(call.input->shape[2]);
        const ChannelsFirst in{channels, call.in_sizes.voxels()};
        const ChannelsFirst out{channels, call.out_sizes.voxels()};
        if constexpr (kAffine) {
          if (!call.field->present) {
            return body(make_resampling<S, T, D, true, false>(call, in, out));
          }
        }
        body(make_resampling<S, T, D, kAffine, true>(call, in, out));
      }
    });
  });
}

// The same, of floating-point numbers.
template <bool kChannelsLast, class Body>
void with_resampling(const ResampleCall& call, const Body& body) {
  // Fields are never stored in half precision.
  dispatch_storage<!kChannelsLast>(call.input->dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    with_stored<kChannelsLast, S, Arithmetic<S>>(call, body);
  });
}

template <bool kChannelsLast, class Device>
void resample_forward(const Device& device, const ResampleCall& call, const Tensor& output) {
  if (output.shape.count() == 0) return;
  const VoxelSpace space = voxel_space(call.groups, call.items, call.out_sizes);
  with_resampling<kChannelsLast>(call, [&](const auto& resampling) {
    using R = std::decay_t<decltype(resampling)>;
    ResampleForward<R> body{resampling, Operand<typename R::S>(output), call.add_field};
    for_each_voxel(device, space, body);
  });
}

template <bool kChannelsLast, class Device>
void resample_backward(const Device& device, const ResampleCall& call) {
  if (call.grad_output->shape.count() == 0) {
    for (const Tensor* gradient : {call.grad_input, call.grad_affine, call.grad_field}) {
      if (gradient->present) clear(device, *gradient);
    }
    return;
  }
  const VoxelSpace space = voxel_space(call.groups, call.items, call.out_sizes);
  with_resampling<kChannelsLast>(call, [&](const auto& resampling) {
    using R = std::decay_t<decltype(resampling)>;
    using S = typename R::S;
    using T = typename R::T;
    const Operand<const S> grad_output(*call.grad_output);
    if (call.grad_field->present) {
      const bool shared = call.grad_field->shape[1] != call.items;
      VoxelSpace outer = space;
      if (shared) outer.items = 1;
      for_each_voxel(device, outer,
                     FieldGradient<R>{resampling, grad_output, Operand<T>(*call.grad_field),
                                      call.add_field, shared ? space.items : 1});
    }
    if (call.grad_input->present) {
      constexpr bool kRounds = !std::is_same_v<S, T>;
      const Tensor& sums = kRounds ? *call.scatter.sums : *call.grad_input;
      scatter(device, space, resampling, *call.grad_output, sums, call.scatter);
      if constexpr (kRounds) round_image<S>(device, sums, *call.grad_input);
    }
    if constexpr (R::kAffine) {
      if (call.grad_affine->present) {
        const AffineMoments<R> body{resampling, grad_output};
        reduce_voxels(device, space, body, *call.partial_sums, *call.grad_affine);
      }
    } else if (call.grad_affine->present) {
      clear(device, *call.grad_affine);  // a full warp ignores the affine
    }
  });
}

}  // namespace regkernels
