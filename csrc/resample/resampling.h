// Sampling one array at the positions that an affine and a vector field give: what the forward op
// and all gradients do for one voxel.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "maths/coordinates.h"
#include "maths/sampling.h"
#include "maths/voxel_vectors.h"
#include "resample/field_layout.h"
#include "resample/layout.h"

namespace regkernels {

// A run of planes of the array that is sampled, and where it and the output begin. A call for whole
// volumes has none, and no kernel for one looks here.
struct SampledSlab {
  const int32_t* first = nullptr;
  int planes = 0;
  int answering = 0;  // see Slab
};

// The plane of a cell for which the planes at hand do not answer. No boundary rule leads there.
inline constexpr int kUnanswered = -3;

// What a call's kernels need to know. kField is false where an affine alone places the samples:
// then most of a position is the same for all voxels along z, and the compiler sees it.
//
// The array that is sampled, the result and its cotangent are stored as S; everything else, and all
// arithmetic, is T.
template <class Storage, class Compute, int kD, bool kHasAffine, bool kHasField, class InLayout,
          bool kIsSlab = false>
struct Resampling {
  using S = Storage;
  using T = Compute;
  static constexpr int D = kD;
  static constexpr bool kAffine = kHasAffine;
  static constexpr bool kField = kHasField;
  static constexpr bool kSlab = kIsSlab;
  static constexpr bool kCubic = false;  // see cubic.h
  // Whether there is vector code for the neighbours of a row.
  static constexpr bool kComputesNeighbours = std::is_same_v<S, T>;
  using Layout = InLayout;
  using Map = PositionMap<T, D, kAffine>;

  Map map;
  Boundary<T, D> boundary;
  int64_t stride[D];  // from voxel to voxel of the input, in voxels
  int64_t step[D];    // the same in bytes
  Layout in_layout;
  Layout out_layout;
  Operand<const S> input;
  Operand<const T> affine;
  Operand<const T> field;
  FieldLayout<T, D> field_layout;
  SampledSlab slab;

  // Only where channels lie first, in images, may the field be other than packed.
  REGKERNELS_HD bool field_is_packed() const { return Layout::kLast || field_layout.packed; }

  // A batch element, which is asked for positions and samples.
  struct Element {
    const Resampling* self;
    const S* input;
    const T* field;
    typename Map::Item item;
    // The first planes of a slab: of what is sampled and of the output.
    int first_sampled = 0;
    int first = 0;

    // A voxel's place in the output's whole volume.
    REGKERNELS_HD Vec<int, D> place(const Voxel& voxel) const {
      Vec<int, D> index = voxel_index<D>(voxel);
      if constexpr (kSlab) index[D - 1] += first;
      return index;
    }
    // Where plane 0 of the whole volume would be, of an array of which there are planes from
    // `first_sampled` on.
    template <class Value>
    REGKERNELS_HD Value* plane_zero(Value* data) const {
      if constexpr (kSlab) data -= first_sampled * self->stride[D - 1] * Layout::kPixel;
      return data;
    }
    // Whether the planes at hand answer for a sample. Where they do not, its cell becomes one
    // outside of the volume, of which no corner counts.
    REGKERNELS_HD bool answer(Cell<T, D>& cell) const {
      if constexpr (kSlab) {
        const int last = self->map.in.size[D - 1] - 1;
        const int index = cell.index[D - 1];
        const int lower = (index < 0 ? 0 : index < last ? index : last) - first_sampled;
        const int upper = (index < 0 ? 0 : index + 1 < last ? index + 1 : last) - first_sampled;
        if (unsigned(lower) >= unsigned(self->slab.answering) ||
            unsigned(upper) >= unsigned(self->slab.planes)) {
          cell.index[D - 1] = kUnanswered;
          return false;
        }
      }
      return true;
    }

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
      if (!self->field_is_packed()) return self->field_layout.load(field, voxel_offset(voxel));
      return load_vec<T, D>(out_pointer<D>(field, voxel));
    }
    // The same, of the voxel at an offset.
    REGKERNELS_HD Vec<T, D> vector(int64_t offset) const {
      if (!kField || field == nullptr) return Vec<T, D>{};
      if (!self->field_is_packed()) return self->field_layout.load(field, offset);
      return load_vec<T, D>(field + offset * D);
    }
#ifdef __CUDACC__
    // Has the cache fetch what `vector` will load.
    __device__ __forceinline__ void prefetch_vector(int64_t offset) const {
      if (!kField || field == nullptr || !self->field_is_packed()) return;
      asm volatile("prefetch.global.L1 [%0];" ::"l"(field + offset * D));
    }
#endif
    template <bool kOnce = false>
    REGKERNELS_HD Vec<T, D> position(const Voxel& voxel, const Vec<T, D>& u) const {
      return self->map.template position<kField, kOnce>(item, place(voxel), u);
    }
    // Loads the values at the corners of a cell; `convert` turns what is stored into a value. With
    // `kChecked` the cell may lie partly outside of the volume, where values are `outside`.
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

    // Calls body(cell, IntTag<0>, unused) for a sample to which no boundary rule applies and
    // body(cell, IntTag<1>, slope) for any other. If some samples of a warp are not inner ones, the
    // warp treats none as inner: it would have to follow both paths anyway. Both give the same
    // result.
    template <class Body>
    REGKERNELS_HD auto sample(const Vec<T, D>& p, const Body& body) const {
      Cell<T, D> cell;
      Vec<T, D> slope{};
      if (warp_agrees(self->boundary.find_inner_cell(p, cell) && answer(cell))) {
        return body(cell, IntTag<0>{}, slope);
      }
      cell = self->boundary.find_cell(p, slope);
      answer(cell);
      return body(cell, IntTag<1>{}, slope);
    }

    // Computes the weights of the corners, which are 0 outside of the volume. Returns the voxel of
    // corner 0.
    REGKERNELS_HD Vec<int, D> corner_weights(const Vec<T, D>& p, T (&weight)[1 << D]) const {
      Cell<T, D> cell;
      if (self->boundary.find_inner_cell(p, cell) && answer(cell)) {
        REGKERNELS_UNROLL
        for (int i = 0; i < (1 << D); ++i) weight[i] = cell.weight(i);
        return cell.index;
      }
      Vec<T, D> slope;
      cell = self->boundary.find_cell(p, slope);
      answer(cell);
      REGKERNELS_UNROLL
      for (int i = 0; i < (1 << D); ++i) {
        weight[i] = cell.inside(i, self->map.in.size) ? cell.weight(i) : T(0);
      }
      return cell.index;
    }

    // The gradient with respect to the position of the sum of all channels, each weighted with its
    // cotangent. The cotangents begin at `grad`.
    REGKERNELS_HD Vec<T, D> position_gradient(const Vec<T, D>& p, const S* grad) const {
      return sample(p, [&](const Cell<T, D>& cell, auto checked, const Vec<T, D>& slope) {
        constexpr bool kChecked = decltype(checked)::value;
        // This is, for each corner, the sum over channels of cotangent times value.
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
    if constexpr (kSlab) {
      result.first_sampled = slab.first[0];
      result.first = slab.first[1];
    }
    result.input = opaque_pointer(result.plane_zero(input.at(group, n)));
    result.field = !kField || field.data == nullptr ? nullptr : opaque_pointer(field.at(group, n));
    result.item = map.item(kAffine ? affine.at(group, n) : nullptr);
    return result;
  }
};

}  // namespace regkernels
