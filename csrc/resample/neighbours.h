// Rows of samples on the CPU: vector code places and samples neighbouring voxels together.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "maths/coordinates.h"
#include "maths/sampling.h"
#include "maths/voxel_vectors.h"
#include "resample/resampling.h"

namespace regkernels {

// Calls body(map) with the map of a Resampling. The compiler then knows the map's placement, since
// vector code must not have branches.
template <class R, class Body>
void with_known_placement(const R& resampling, const Body& body) {
  const auto call_with = [&](Placement placement) {
    typename R::Map map = resampling.map;
    map.placement = placement;
    body(map);
  };
  // Only two placements make a difference: without a matrix it does not matter whether it is last.
  if constexpr (R::kField) {
    constexpr Placement kOtherPlacement = R::kAffine ? Placement::kAffineLast : Placement::kFull;
    if (resampling.map.placement == kOtherPlacement) return call_with(kOtherPlacement);
  }
  call_with(Placement::kAffineFirst);
}

// Where the samples of some neighbours lie. For `kValues` see Boundary::find_cell_within.
template <class R, bool kValues>
struct Neighbours {
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kCount = 32;

  int repeated;        // so many of the first have been there in the step before
  int offset[kCount];  // to corner 0, in elements; where a sample is not within, it may be read
  T fraction[D][kCount];
  int within[kCount];
  bool all_within;
  int alone[kCount];  // if not all are within: whether one that is not may still touch the volume
  bool all_between;   // no sample lies on a voxel's plane, where some corners must not be touched
  const T* field;     // their vectors, if there are any
  T unpacked[kCount * D];

  static bool suit(const typename R::Element& source, int row_size) {
    const Boundary<T, D>& boundary = source.self->boundary;
    bool result = row_size >= kCount && (!R::kField || source.field != nullptr);
    int64_t elements = R::Layout::kPixel;
    for (int k = 0; k < D; ++k) {
      result = result && boundary.inner_limit[k] > 0;
      const bool is_slab = R::kSlab && k == D - 1;
      elements *= is_slab ? planes_spanned(source) : boundary.size[k];
    }
    if constexpr (R::kSlab) result = result && source.self->slab.planes > 1;
    return result && elements <= INT32_MAX;
  }
  // Planes from the whole volume's first one to the farthest at hand: slabs may begin before it.
  static int64_t planes_spanned(const typename R::Element& source) {
    const int64_t first = source.first_sampled;
    return std::max(-first, first + source.self->slab.planes);
  }

  void place(const typename R::Element& source, const Voxel& first) {
    const Boundary<T, D> boundary = source.self->boundary;
    if constexpr (R::kField) {
      field = source.template out_pointer<D>(source.field, first);
      if (!source.self->field_is_packed()) {
        for (int i = 0; i < kCount; ++i) {
          const Vec<T, D> u =
              source.self->field_layout.load(source.field, source.voxel_offset(first) + i);
          for (int k = 0; k < D; ++k) unpacked[i * D + k] = u[k];
        }
        field = unpacked;
      }
    }
    int number = 0, between = 0;
    for_each_position(source, first, [&](int i, const Vec<T, D>& p) {
      Cell<T, D> cell;
      const bool is_within = find_cell(source, boundary, p, cell);
      within[i] = is_within;
      number += is_within;
      int row = cell.index[D - 1];
      for (int k = D - 2; k >= 0; --k) row = row * boundary.size[k] + cell.index[k];
      offset[i] = row * R::Layout::kPixel;
      bool is_between = true;
      for (int k = 0; k < D; ++k) {
        fraction[k][i] = cell.fraction[k];
        is_between = is_between & (cell.fraction[k] != 0) & (cell.fraction[k] != 1);
      }
      between += is_between;
    });
    all_within = number == kCount;
    all_between = between == kCount;
    if (all_within) return;
    for_each_position(source, first, [&](int i, const Vec<T, D>& p) {
      bool counts_nothing = boundary.counts_nothing(p);
      if constexpr (R::kSlab) {
        Cell<T, D> cell;
        const bool in_whole = find_in_whole(boundary, p, cell);
        counts_nothing = counts_nothing | (in_whole & !answers(source, cell));
      }
      alone[i] = !within[i] & !counts_nothing;
    });
  }

  // Calls body(i, position) for all neighbours in vector code.
  template <class Body>
  void for_each_position(const typename R::Element& source, const Voxel& first,
                         const Body& body) const {
    const typename R::Map::Item item = source.item;
    const Vec<int, D> place = source.place(first);
    const T* const vectors = field;
    with_known_placement(*source.self, [&](const auto& map) {
#pragma GCC ivdep
      for (int i = 0; i < kCount; ++i) {
        Vec<int, D> voxel = place;
        voxel[0] += i;
        Vec<T, D> u{};
        if constexpr (R::kField) u = load_vec<T, D>(vectors + i * D);
        body(i, map.template position<R::kField>(item, voxel, u));
      }
    });
  }

  // Finds the cell of a sample that vector code can compute, or else one that may be read.
  static bool find_cell(const typename R::Element& source, const Boundary<T, D>& boundary,
                        const Vec<T, D>& p, Cell<T, D>& cell) {
    bool result = find_in_whole(boundary, p, cell);
    if constexpr (R::kSlab) {
      result = result & answers(source, cell);
      cell.index[D - 1] = result ? cell.index[D - 1] : source.first_sampled;
    }
    return result;
  }
  // Finds a cell within the whole volume. Which slab answers for a sample on the last plane depends
  // on the boundary rule, so that such a sample goes by itself where there are slabs.
  static bool find_in_whole(const Boundary<T, D>& boundary, const Vec<T, D>& p, Cell<T, D>& cell) {
    const bool within = boundary.template find_cell_within<kValues>(p, cell);
    return within & (!R::kSlab | (cell.fraction[D - 1] != 1));
  }
  // What Resampling::Element::answer tells, without a branch, of such a cell.
  static bool answers(const typename R::Element& source, const Cell<T, D>& cell) {
    const SampledSlab slab = source.self->slab;
    const int lower = cell.index[D - 1] - source.first_sampled;
    return (unsigned(lower) < unsigned(slab.answering)) &
           (unsigned(lower + 1) < unsigned(slab.planes));
  }

  Cell<T, D> cell(int i) const {
    Cell<T, D> result;
    for (int k = 0; k < D; ++k) result.fraction[k] = fraction[k][i];
    return result;
  }
};

// Computes in vector code, for one channel or for those that lie last, what
// Resampling::Element::position_gradient does, and calls store(i, gradient) for each neighbour. The
// gradient of one that is not within the volume is 0.
template <bool kChecked, class R, class Store>
void neighbour_gradients(const Neighbours<R, false>& near, const typename R::Element& source,
                         const typename R::S* grad, const Store& store) {
  constexpr int D = R::D, kPixel = R::Layout::kPixel;
  const auto corner = source.self->template corner_elements<kPixel>();
  const typename R::S* const input = source.input;
#pragma GCC ivdep
  for (int i = 0; i < near.kCount; ++i) {
    typename R::T dot[1 << D] = {};
    for (int c = 0; c < kPixel; ++c) {
      for (int k = 0; k < (1 << D); ++k) {
        dot[k] += grad[i * kPixel + c] * input[near.offset[i] + corner[k] + c];
      }
    }
    // Where nothing counts, the gradient of zeros is 0.
    for (int k = 0; k < (1 << D); ++k) dot[k] = near.within[i] ? dot[k] : 0;
    store(i, sample_gradient<kChecked>(near.cell(i), dot));
  }
}

// Visits a row of voxels. It calls sample_together(neighbours, first voxel, checked) for kCount
// voxels at a time, where `checked` is what lerp has to be told, and then sample_alone(x) for each
// whose sample is not within the volume but may touch it. Rows that do not suit get sample_alone(x)
// for every voxel. What kAdds to something leaves out the neighbours that are repeated; anything
// else computes them once more, since sample_together may store for those that are alone, too.
template <class R, bool kValues, bool kAdds, class Together, class Alone>
void sample_row(const typename R::Element& source, int z, int y, int size,
                const Together& sample_together, const Alone& sample_alone) {
  using Near = Neighbours<R, kValues>;
  if (!Near::suit(source, size)) {
    for (int x = 0; x < size; ++x) sample_alone(x);
    return;
  }
  Near near;
  for (int begin = 0; begin < size; begin += Near::kCount) {
    const int x = std::min(begin, size - Near::kCount);
    near.repeated = begin - x;
    const Voxel first{z, y, x, true, x, size};
    near.place(source, first);
    if (near.all_between) {
      sample_together(near, first, IntTag<0>{});
    } else {
      sample_together(near, first, IntTag<1>{});
    }
    if (near.all_within) continue;
    for (int i = kAdds ? near.repeated : 0; i < Near::kCount; ++i) {
      if (near.alone[i]) sample_alone(x + i);
    }
  }
}

}  // namespace regkernels
