// Rows of samples on the CPU: vector code places and samples neighbouring voxels together.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "maths/coordinates.h"
#include "maths/sampling.h"
#include "maths/voxel_vectors.h"

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

// Where the samples of some neighbours lie. A sample that is not `within` the volume has a cell
// that may be read, but is not its own. For `kLast` see Boundary::find_cell_within.
template <class R, bool kLast>
struct Neighbours {
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kCount = 32;

  int repeated;        // so many of the first have been there in the step before
  int offset[kCount];  // to corner 0, in elements
  T fraction[D][kCount];
  int within[kCount];
  const T* field;       // their vectors, if there are any
  T unpacked[kCount * D];
  bool all_within;
  bool all_between;  // no sample lies on a voxel's plane, where some corners must not be touched

  static bool suit(const typename R::Element& source, int row_size) {
    const Boundary<T, D>& boundary = source.self->boundary;
    // Whether a slab answers for a sample takes branches.
    bool result = !R::kSlab && row_size >= kCount && (!R::kField || source.field != nullptr);
    int64_t elements = R::Layout::kPixel;
    for (int k = 0; k < D; ++k) {
      result = result && boundary.inner_limit[k] > 0;
      elements *= boundary.size[k];
    }
    return result && elements <= INT32_MAX;
  }

  void place(const typename R::Element& source, const Voxel& first) {
    const Boundary<T, D> boundary = source.self->boundary;
    const typename R::Map::Item item = source.item;
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
    const T* const vectors = field;
    int number = 0, between = 0;
    with_known_placement(*source.self, [&](const auto& map) {
#pragma GCC ivdep
      for (int i = 0; i < kCount; ++i) {
        Vec<int, D> voxel = voxel_index<D>(first);
        voxel[0] += i;
        Vec<T, D> u{};
        if constexpr (R::kField) u = load_vec<T, D>(vectors + i * D);
        Cell<T, D> cell;
        const Vec<T, D> p = map.template position<R::kField>(item, voxel, u);
        within[i] = boundary.template find_cell_within<kLast>(p, cell);
        number += within[i];
        int row = cell.index[D - 1];
        for (int k = D - 2; k >= 0; --k) row = row * boundary.size[k] + cell.index[k];
        offset[i] = row * R::Layout::kPixel;
        bool is_between = true;
        for (int k = 0; k < D; ++k) {
          fraction[k][i] = cell.fraction[k];
          is_between = is_between & (cell.fraction[k] != 0) & (cell.fraction[k] != 1);
        }
        between += is_between;
      }
    });
    all_within = number == kCount;
    all_between = between == kCount;
  }

  Cell<T, D> cell(int i) const {
    Cell<T, D> result;
    for (int k = 0; k < D; ++k) result.fraction[k] = fraction[k][i];
    return result;
  }
};

// Computes in vector code, for one channel or for those that lie last, what
// Resampling::Element::position_gradient does, and calls store(i, gradient) for each neighbour.
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
    store(i, sample_gradient<kChecked>(near.cell(i), dot));
  }
}

// Visits a row of voxels. It calls sample_together(neighbours, first voxel, checked) for kCount
// voxels at a time, where `checked` is what lerp has to be told, and then sample_alone(x) for each
// whose sample is not within the volume. Rows that do not suit get sample_alone(x) for every voxel.
template <class R, bool kLast, class Together, class Alone>
void sample_row(const typename R::Element& source, int z, int y, int size,
                const Together& sample_together, const Alone& sample_alone) {
  using Near = Neighbours<R, kLast>;
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
    for (int i = near.repeated; i < Near::kCount; ++i) {
      if (!near.within[i]) sample_alone(x + i);
    }
  }
}

}  // namespace regkernels
