// Rows of samples on the CPU: neighbouring voxels, placed and sampled together by vector code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "maths/coordinates.h"
#include "maths/sampling.h"
#include "maths/voxel_vectors.h"

namespace regkernels {

// Calls body(map) with the map of a Resampling, of which the compiler then knows the placement:
// in vector code there must be no branches.
template <class R, class Body>
void with_known_placement(const R& resampling, const Body& body) {
  const auto known = [&](Placement placement) {
    typename R::Map map = resampling.map;
    map.placement = placement;
    body(map);
  };
  // Those that make a difference: without a matrix it is all the same whether it comes last.
  if constexpr (R::kField) {
    constexpr Placement kOther = R::kAffine ? Placement::kAffineLast : Placement::kFull;
    if (resampling.map.placement == kOther) return known(kOther);
  }
  known(Placement::kAffineFirst);
}

// Where the samples of some neighbours lie. What is not `within` the volume has a cell that may be
// read, but is not its own. `kLast`: see Boundary::find_cell_within.
template <class R, bool kLast>
struct Neighbours {
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kCount = 32;

  int offset[kCount];  // of corner 0, in elements
  T fraction[D][kCount];
  int within[kCount];
  bool all_within;
  bool all_between;  // no sample lies on a voxel's plane, where some corners must not be touched

  static bool suit(const typename R::Element& source, int row_size) {
    const Boundary<T, D>& boundary = source.self->boundary;
    bool result = row_size >= kCount && (!R::kField || source.field != nullptr);
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
    const T* field = nullptr;
    if constexpr (R::kField) field = source.template out_pointer<D>(source.field, first);
    int number = 0, between = 0;
    with_known_placement(*source.self, [&](const auto& map) {
#pragma GCC ivdep
      for (int i = 0; i < kCount; ++i) {
        Vec<int, D> voxel = voxel_index<D>(first);
        voxel[0] += i;
        Vec<T, D> u{};
        if constexpr (R::kField) u = load_vec<T, D>(field + i * D);
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

// Calls take(neighbours, first voxel, checked) for some voxels at a time until a row is done, with
// what lerp has to be told; and then one(x) for each whose sample is not within the volume; or
// one(x) for all.
template <class R, bool kLast, class Take, class One>
void take_row(const typename R::Element& source, int z, int y, int size, const Take& take,
              const One& one) {
  using Near = Neighbours<R, kLast>;
  if (!Near::suit(source, size)) {
    for (int x = 0; x < size; ++x) one(x);
    return;
  }
  Near near;
  for (int begin = 0; begin < size; begin += Near::kCount) {
    // The last ones may be among those before, and get the same values again.
    const int x = std::min(begin, size - Near::kCount);
    const Voxel first{z, y, x, true, x, size};
    near.place(source, first);
    if (near.all_between) {
      take(near, first, IntTag<0>{});
    } else {
      take(near, first, IntTag<1>{});
    }
    if (near.all_within) continue;
    for (int i = 0; i < Near::kCount; ++i) {
      if (!near.within[i]) one(x + i);
    }
  }
}

}  // namespace regkernels
