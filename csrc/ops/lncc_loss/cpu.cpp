#include <algorithm>
#include <cmath>
#include <vector>

#include "core/for_each.h"
#include "core/reduce.h"
#include "core/scratch.h"
#include "core/vector_code.h"
#include "ops/lncc_loss/call.h"
#include "ops/lncc_loss/lncc_loss.h"
#include "ops/losses/finish.h"

namespace regkernels {

namespace {

// Rows in memory are a multiple of so many values long, so that loops need no special end.
constexpr int kBlock = 16;

// About so many values go through all steps together: enough that few loops are begun, and few
// enough that they stay in a near cache. The order in which sums are taken depends on this.
constexpr int64_t kStrip = 2048;

// The box sums of so many rows or planes are computed together.
constexpr int kTogether = 4;

// One loop takes so many taps on either side of a window's middle. A larger window takes more
// loops.
constexpr int kTaps = 4;

// Calls body(IntTag<taps>, IntTag<first>, d) for the offsets from d to d + taps - 1, and so on up
// to the radius. With a number of taps that the compiler knows, the loops over them are unrolled
// and those over voxels become vector code.
template <class Body>
void for_taps(int radius, const Body& body) {
  const auto some = [&](int taps, auto first, int d) {
    switch (taps) {
      case 0:
        return body(IntTag<0>{}, first, d);
      case 1:
        return body(IntTag<1>{}, first, d);
      case 2:
        return body(IntTag<2>{}, first, d);
      case 3:
        return body(IntTag<3>{}, first, d);
      default:
        return body(IntTag<kTaps>{}, first, d);
    }
  };
  some(std::min(radius, kTaps), IntTag<1>{}, 1);
  for (int d = kTaps + 1; d <= radius; d += kTaps) {
    some(std::min(radius - d + 1, kTaps), IntTag<0>{}, d);
  }
}

// out[x] = Σ_d weight[|d|] row(d)[x], for d from -radius to radius. Every sum is taken in the same
// order: from the middle outwards.
template <class T, class Row>
void weigh_rows(const Row& row, const T* weights, int radius, int64_t size, T* out) {
  const int64_t count = size & -kBlock;  // no change, but the compiler knows
  for_taps(radius, [&](auto taps, auto is_first, int begin) {
    constexpr int kCount = decltype(taps)::value;
    constexpr bool kFirst = decltype(is_first)::value;
    const T* const middle = row(0);
    const T *below[kCount + 1], *above[kCount + 1];  // one more, as there may be none
    T weight[kCount + 1];
    for (int k = 0; k < kCount; ++k) {
      below[k] = row(-(begin + k));
      above[k] = row(begin + k);
      weight[k] = weights[begin + k];
    }
    const T middle_weight = weights[0];
#pragma GCC ivdep
    for (int64_t x = 0; x < count; ++x) {
      T sum = kFirst ? middle_weight * middle[x] : out[x];
      for (int k = 0; k < kCount; ++k) sum += weight[k] * (below[k][x] + above[k][x]);
      out[x] = sum;
    }
  });
}

// Computes the box sums of four rows, or planes, together, since their windows share most of what
// they hold: they are row(k) for k from 0 to 2 radius + 3, and the sums go to out(0) to out(3).
template <class T, class Row, class Out>
void add_four(const Row& row, int radius, int64_t size, const Out& out) {
  const int64_t count = size & -kBlock;
  const T *const row_0 = row(0), *const row_1 = row(1), *const row_2 = row(2);
  const int end = 2 * radius + 1;
  const T *const end_0 = row(end), *const end_1 = row(end + 1), *const end_2 = row(end + 2);
  T *const out_0 = out(0), *const out_1 = out(1), *const out_2 = out(2), *const out_3 = out(3);
  for_taps(radius - 1, [&](auto pairs, auto is_first, int begin) {
    constexpr int kRows = 2 * decltype(pairs)::value;
    constexpr bool kFirst = decltype(is_first)::value;
    const T* rows[kRows + 1];
    for (int k = 0; k < kRows; ++k) rows[k] = row(2 * begin + 1 + k);
#pragma GCC ivdep
    for (int64_t x = 0; x < count; ++x) {
      T shared = 0;
      for (int k = 0; k < kRows; ++k) shared += rows[k][x];
      if constexpr (kFirst) {
        const T second = row_2[x], third = end_0[x];
        const T before = row_1[x] + second, after = third + end_1[x];
        out_0[x] = shared + (row_0[x] + before);
        out_1[x] = shared + before + third;
        out_2[x] = shared + second + after;
        out_3[x] = shared + (after + end_2[x]);
      } else {
        out_0[x] += shared;
        out_1[x] += shared;
        out_2[x] += shared;
        out_3[x] += shared;
      }
    }
  });
}

// Computes box sums along a row, of at least seven values each, from sums of three. There have to
// be kBlock values before and after the row; `threes` has room for these, too.
template <class T>
void add_in_threes(const T* row, const Window<T>& window, int64_t size, T* threes, T* out) {
  const int64_t count = (size + 2 * kBlock) & -kBlock;
  const T* const begin = row - kBlock;
#pragma GCC ivdep
  for (int64_t x = 0; x < count; ++x) threes[x] = begin[x] + (begin[x - 1] + begin[x + 1]);
  // In the middle are one value, three, or three and one on either side, as the radius leaves.
  const int left = window.radius % 3;
  const T* const about = threes + kBlock;
  const auto summand = [=](int d) -> const T* {
    const int side = d < 0 ? -1 : 1;
    if (d == 0) return left == 0 ? row : about;
    if (left == 2 && d == side) return row + 2 * side;
    return about + 3 * d - side * (left == 0 ? 1 : left == 1 ? 0 : 2);
  };
  weigh_rows(summand, window.weight[0], window.radius / 3 + (left == 2), size, out);
}

// Does the same as weigh_rows for the values of two images and their products.
template <class T, class Row>
void weigh_products(const Row& row_i, const Row& row_j, const T* weights, int radius, int64_t size,
                    T* const (&out)[kWindowSums]) {
  const int64_t count = size & -kBlock;
  T* const out_i = out[0];
  T* const out_j = out[1];
  T* const out_ii = out[2];
  T* const out_jj = out[3];
  T* const out_ij = out[4];
  for_taps(radius, [&](auto taps, auto is_first, int begin) {
    constexpr int kRows = 2 * decltype(taps)::value;
    constexpr bool kFirst = decltype(is_first)::value;
    const T* const middle_i = row_i(0);
    const T* const middle_j = row_j(0);
    const T *rows_i[kRows + 1], *rows_j[kRows + 1];
    T weight[kRows + 1];
    for (int k = 0; k < kRows; ++k) {
      const int d = k % 2 == 0 ? -(begin + k / 2) : begin + k / 2;
      rows_i[k] = row_i(d);
      rows_j[k] = row_j(d);
      weight[k] = weights[begin + k / 2];
    }
    const T middle_weight = weights[0];
#pragma GCC ivdep
    for (int64_t x = 0; x < count; ++x) {
      T sums[kWindowSums] = {};
      if constexpr (kFirst) {
        add_products(middle_weight, middle_i[x], middle_j[x], sums);
      } else {
        sums[0] = out_i[x];
        sums[1] = out_j[x];
        sums[2] = out_ii[x];
        sums[3] = out_jj[x];
        sums[4] = out_ij[x];
      }
      for (int k = 0; k < kRows; ++k) add_products(weight[k], rows_i[k][x], rows_j[k][x], sums);
      out_i[x] = sums[0];
      out_j[x] = sums[1];
      out_ii[x] = sums[2];
      out_jj[x] = sums[3];
      out_ij[x] = sums[4];
    }
  });
}

// The newest planes of several fields. The next plane takes the place of the oldest.
template <class T>
class Ring {
 public:
  Ring(Scratch& scratch, int length, int fields, int64_t plane)
      : length_(length),
        fields_(fields),
        plane_(plane),
        data_(scratch.take<T>(length * fields * plane)) {}
  // `z` may be as low as -2 length.
  T* at(int z, int field) {
    return data_ + ((z + 2 * length_) % length_ * int64_t{fields_} + field) * plane_;
  }

 private:
  int length_, fields_;
  int64_t plane_;
  T* data_;
};

// A value that is typical of an image: the mean of some of its voxels, or 0.
template <class T>
T typical(const T* image, int64_t count) {
  constexpr int64_t kSamples = 1024;
  const int64_t step = std::max<int64_t>(1, count / kSamples);
  double sum = 0;
  int64_t samples = 0, zeros = 0;
  for (int64_t i = step / 2; i < count; i += step) {
    if (std::isfinite(image[i])) {
      sum += image[i];
      zeros += image[i] == 0;
      ++samples;
    }
  }
  if (fades_to_zero(zeros, samples)) return 0;
  return static_cast<T>(samples > 0 ? sum / samples : 0);
}

// Computes the correlations and gradients of the planes [begin, end) of one image's channel. Plane
// by plane, a few rows at a time go through all steps: products are summed over z, y and x,
// correlations are computed, and adjoint fields are summed over y and x. Only the sums of these
// over z need more planes.
//
// In every buffer a row is followed by values from outside of the volume, as many as a window
// reaches. They precede the next row too, so that a few rows are one long row to most loops.
template <class T, int kFields>
class Slab {
 public:
  Slab(const LnccOperands<T>& lncc, T scale, int64_t group, int64_t channel)
      : lncc_(lncc),
        window_(lncc.window),
        radius_(lncc.window.radius),
        radius_z_(lncc.window.radius_z),
        scale_(scale),
        group_(group),
        channel_(channel),
        nx_(static_cast<int>(lncc.checked.sizes.x)),
        ny_(static_cast<int>(lncc.checked.sizes.y)),
        nz_(static_cast<int>(lncc.checked.sizes.z)),
        stride_((lncc.checked.sizes.x + radius_ + kBlock - 1) / kBlock * kBlock),
        strip_(static_cast<int>(std::max<int64_t>(1, kStrip / stride_ / kTogether)) * kTogether),
        together_(kFields > 0 && window_.rectangular && radius_z_ > 0 ? kTogether : 1),
        images_(scratch_, 2 * radius_z_ + together_, 2, ny_ * stride_),
        adjoint_sums_(scratch_, 2 * radius_z_ + together_, kFields, ny_ * stride_),
        products_(scratch_.take<T>(kWindowSums * padded_plane())),
        adjoint_(zeros(kFields * padded_plane())),
        columns_(zeros(strip_ * stride_ + 4 * kBlock)),
        threes_(zeros(strip_ * stride_ + 4 * kBlock)),
        // There are no more adjoint fields than window sums.
        sums_(scratch_.take<T>(kWindowSums * strip_ * stride_)),
        ncc_(scratch_.take<T>(strip_ * stride_)) {}

  // Σ weight ncc of the plane z goes to plane_sums[z], unless that is null.
  void run(int64_t item, int begin, int end, bool first_item, double* plane_sums) {
    prepare(item);
    const int reach = kFields > 0 ? radius_z_ : 0;
    for (int newest = begin - reach - radius_z_; newest < end + reach + radius_z_; ++newest) {
      load_plane(newest);
      const int z = newest - radius_z_;
      if (z < begin - reach) continue;
      const bool exists = z >= 0 && z < nz_;
      const double sum = exists ? correlate_plane(z) : 0;
      if (plane_sums != nullptr && z >= begin && z < end) plane_sums[z] = sum;
      if constexpr (kFields > 0) {
        if (!exists) std::fill_n(adjoint_sums_.at(z, 0), kFields * (ny_ * stride_), T(0));
        const int ready = z - radius_z_ + 1;
        if (ready - begin >= together_ && (ready - begin) % together_ == 0) {
          assemble_planes(ready - together_, together_, first_item);
        } else if (ready == end) {
          const int left = (end - begin) % together_;
          for (int i = left; i > 0; --i) assemble_planes(end - i, 1, first_item);
        }
      }
    }
  }

 private:
  T* zeros(int64_t count) {
    T* const values = scratch_.take<T>(count);
    std::fill_n(values, count, T(0));
    return values;
  }
  int64_t padded_plane() const { return (ny_ + 2 * radius_) * stride_; }
  T* image(int z, int which, int y) { return images_.at(z, which) + y * stride_; }
  T* product(int s, int y) { return products_ + s * padded_plane() + (y + radius_) * stride_; }
  T* sums(int s) { return sums_ + s * strip_ * stride_; }
  T* adjoint(int f, int y) { return adjoint_ + f * padded_plane() + (y + radius_) * stride_; }
  T* adjoint_sum(int z, int f, int y) { return adjoint_sums_.at(z, f) + y * stride_; }

  // Fills what is outside of the volume, where images are 0, that is -pivot. Adjoint fields are 0
  // there, which they already are.
  void prepare(int64_t item) {
    item_ = item;
    image_i_ = lncc_.image_i.at(group_, item, channel_);
    image_j_ = lncc_.image_j.at(group_, item, channel_);
    const int64_t voxels = static_cast<int64_t>(nx_) * ny_ * nz_;
    pivot_i_ = pivot_near(typical(image_i_, voxels), window_);
    pivot_j_ = pivot_near(typical(image_j_, voxels), window_);
    for (int z = 0; z < 2 * radius_z_ + together_; ++z) {
      std::fill_n(image(z, 0, 0), ny_ * stride_, -pivot_i_);
      std::fill_n(image(z, 1, 0), ny_ * stride_, -pivot_j_);
    }
    T mass = 0;
    for (int d = -radius_z_; d <= radius_z_; ++d) mass += window_.weight[2][std::abs(d)];
    const T outside[kWindowSums] = {-mass * pivot_i_, -mass * pivot_j_, mass * pivot_i_ * pivot_i_,
                                    mass * pivot_j_ * pivot_j_, mass * pivot_i_ * pivot_j_};
    for (int s = 0; s < kWindowSums; ++s) {
      std::fill_n(product(s, -radius_), padded_plane(), outside[s]);
    }
  }

  // Loads a plane of the images, relative to their pivots.
  void load_plane(int z) {
    const bool exists = z >= 0 && z < nz_;
    const T pivot_i = pivot_i_, pivot_j = pivot_j_;
    for (int y = 0; y < ny_; ++y) {
      T* const i = image(z, 0, y);
      T* const j = image(z, 1, y);
      if (exists) {
        const T* const from_i = image_i_ + in_volume(z, y);
        const T* const from_j = image_j_ + in_volume(z, y);
#pragma GCC ivdep
        for (int x = 0; x < nx_; ++x) i[x] = from_i[x] - pivot_i;
#pragma GCC ivdep
        for (int x = 0; x < nx_; ++x) j[x] = from_j[x] - pivot_j;
      } else {
        std::fill_n(i, nx_, -pivot_i);
        std::fill_n(j, nx_, -pivot_j);
      }
    }
  }
  int64_t in_volume(int z, int y) const { return (static_cast<int64_t>(z) * ny_ + y) * nx_; }

  // Computes the correlations and adjoint fields of a plane. Returns Σ weight ncc.
  double correlate_plane(int z) {
    double total = 0;
    int summed = 0, adjoint_summed = 0;  // rows
    for (int begin = 0; begin < ny_; begin += strip_) {
      const int end = std::min(begin + strip_, ny_);
      const int needed = std::min(end + radius_, ny_);
      sum_products(z, summed, needed);
      summed = needed;
      correlate_rows(begin, end);
      for (int y = begin; y < end; ++y) {
        total += finish_row(z, y, ncc_ + (y - begin) * stride_);
      }
      if constexpr (kFields > 0) {
        const int ready = end == ny_ ? ny_ : end - radius_;
        while (adjoint_summed < ready) {
          const int until = std::min(adjoint_summed + strip_, ready);
          sum_adjoint(z, adjoint_summed, until);
          adjoint_summed = until;
        }
      }
    }
    return total;
  }

  // Sums products over z.
  void sum_products(int z, int begin, int end) {
    T* out[kWindowSums];
    for (int s = 0; s < kWindowSums; ++s) out[s] = product(s, begin);
    const auto row = [=](int which) {
      return [=](int d) -> const T* { return image(z + d, which, begin); };
    };
    weigh_products(row(0), row(1), window_.weight[2], radius_z_, (end - begin) * stride_, out);
  }

  // Sums the rows of a field over y and x.
  void sum_rows(const T* field, int rows, T* out) {
    T* const columns = columns_ + 2 * kBlock;
    int y = 0;
    if (window_.rectangular) {
      for (; y + kTogether <= rows; y += kTogether) {
        add_four<T>([=](int k) { return field + (y - radius_ + k) * stride_; }, radius_, stride_,
                    [=](int k) { return columns + (y + k) * stride_; });
      }
    }
    const T* const rest = field + y * stride_;
    const auto row = [=](int d) { return rest + d * stride_; };
    weigh_rows(row, window_.weight[1], radius_, (rows - y) * stride_, columns + y * stride_);
    std::copy_n(columns + stride_ - radius_, radius_, columns - radius_);
    if (window_.rectangular && radius_ >= 3) {
      add_in_threes(columns, window_, rows * stride_, threes_, out);
    } else {
      const auto shifted = [=](int d) -> const T* { return columns + d; };
      weigh_rows(shifted, window_.weight[0], radius_, rows * stride_, out);
    }
  }

  // Computes correlations and adjoint fields, which finish_row has to weigh.
  void correlate_rows(int begin, int end) {
    const T* from[kWindowSums];
    for (int s = 0; s < kWindowSums; ++s) {
      sum_rows(product(s, begin), end - begin, sums(s));
      from[s] = sums(s);
    }
    T* to[kFields == 0 ? 1 : kFields];
    for (int f = 0; f < kFields; ++f) to[f] = adjoint(f, begin);
    T* const ncc = ncc_;
    const Window<T> window = window_;
    const int64_t count = (end - begin) * stride_ & -kBlock;
#pragma GCC ivdep
    for (int64_t x = 0; x < count; ++x) {
      const T here[] = {from[0][x], from[1][x], from[2][x], from[3][x], from[4][x]};
      const Correlation<T> at = correlate(here, window);
      ncc[x] = at.ncc;
      if constexpr (kFields > 0) {
        T fields[kFields];
        adjoint_fields(at, at.mean_i, at.mean_j, fields);
        for (int f = 0; f < kFields; ++f) to[f][x] = fields[f];
      }
    }
  }

  // Weighs the correlations and adjoint fields of a row, and clears what lies behind its end.
  // Returns Σ weight ncc.
  double finish_row(int z, int y, T* ncc) {
    const auto row = [=](const auto& of) {
      return of.present() ? of.at(group_, item_, channel_) + in_volume(z, y) : nullptr;
    };
    const T* const mask = row(lncc_.mask);
    const T* const cotangent = row(lncc_.cotangent);
    T* const map = row(lncc_.map);
    if (mask) multiply(mask, ncc);
    for (int x = 0; map && x < nx_; ++x) map[x] = -ncc[x];
    std::fill(ncc + nx_, ncc + stride_, T(0));
    for (int f = 0; f < kFields; ++f) {
      T* const field = adjoint(f, y);
      if (mask) multiply(mask, field);
      if (cotangent) multiply(cotangent, field);
      std::fill(field + nx_, field + stride_, T(0));
    }
    // The row is summed in lanes, since a single sum would wait for each addition.
    T lanes[kBlock] = {};
    for (int64_t x = 0; x < stride_; x += kBlock) {
      for (int lane = 0; lane < kBlock; ++lane) lanes[lane] += ncc[x + lane];
    }
    T sum = 0;
    for (const T lane : lanes) sum += lane;
    return sum;
  }

  void multiply(const T* factor, T* row) const {
#pragma GCC ivdep
    for (int x = 0; x < nx_; ++x) row[x] *= factor[x];
  }

  // Sums adjoint fields over y and x.
  void sum_adjoint(int z, int begin, int end) {
    for (int f = 0; f < kFields; ++f) {
      sum_rows(adjoint(f, begin), end - begin, adjoint_sum(z, f, begin));
    }
  }

  // Completes the sums over z for the planes from z on, and stores their gradients.
  void assemble_planes(int z, int planes, bool first_item) {
    const int strip = strip_ / kTogether;  // rows of each of the planes
    const int64_t size = strip * stride_;
    for (int begin = 0; begin < ny_; begin += strip) {
      const int end = std::min(begin + strip, ny_);
      T* const sums = sums_;
      for (int f = 0; f < kFields; ++f) {
        T* const out = sums + f * kTogether * size;
        if (planes == kTogether) {
          add_four<T>([=](int k) { return adjoint_sum(z - radius_z_ + k, f, begin); }, radius_z_,
                      (end - begin) * stride_, [=](int k) { return out + k * size; });
        } else {
          const auto plane = [=](int d) -> const T* { return adjoint_sum(z + d, f, begin); };
          weigh_rows(plane, window_.weight[2], radius_z_, (end - begin) * stride_, out);
        }
      }
      for (int p = 0; p < planes; ++p) {
        for (int y = begin; y < end; ++y) {
          const auto sum = [=](int f) {
            return sums + (f * kTogether + p) * size + (y - begin) * stride_;
          };
          const T* const i = image(z + p, 0, y);
          const T* const j = image(z + p, 1, y);
          const int64_t row = in_volume(z + p, y);
          assemble_row(i, j, sum(0), sum(1), sum(2), lncc_.sum_i && !first_item,
                       lncc_.grad_i.at(group_, item_, channel_) + row);
          if constexpr (kFields == 5) {
            assemble_row(j, i, sum(0), sum(3), sum(4), lncc_.sum_j && !first_item,
                         lncc_.grad_j.at(group_, item_, channel_) + row);
          }
        }
      }
    }
  }

  void assemble_row(const T* own, const T* other, const T* cross, const T* variance,
                    const T* offset, bool add, T* to) const {
    const T scale = scale_;
#pragma GCC ivdep
    for (int x = 0; x < nx_; ++x) {
      const T value = scale * assemble(own[x], other[x], cross[x], variance[x], offset[x]);
      to[x] = add ? to[x] + value : value;
    }
  }

  const LnccOperands<T>& lncc_;
  const Window<T>& window_;
  int radius_, radius_z_;
  T scale_;
  int64_t group_, channel_;
  int nx_, ny_, nz_;
  int64_t stride_;                 // from row to row in all arrays that follow
  int strip_;                      // rows that go through all steps together
  int together_;                   // planes whose gradients are computed together
  Scratch scratch_;                // holds all arrays that follow
  Ring<T> images_, adjoint_sums_;  // planes; those of the images are relative to their pivots
  T* products_;                    // a plane's sums over z, with `radius` rows before and after
  T* adjoint_;                     // a plane's adjoint fields, with as many rows before and after
  T *columns_, *threes_;           // a strip's sums of one field over y, and those of three of them
  T* sums_;                        // a strip's sums over the whole window
  T* ncc_;                         // a strip's correlations
  int64_t item_ = 0;
  const T *image_i_ = nullptr, *image_j_ = nullptr;
  T pivot_i_ = 0, pivot_j_ = 0;
};

template <class T, int kFields>
void run_slabs(const LnccOperands<T>& lncc, const std::vector<T>& scale,
               std::vector<double>& sums) {
  const LnccCall& checked = lncc.checked;
  const int64_t nz = checked.sizes.z;
  const int64_t items = checked.batch.items;
  const int64_t outer =
      checked.batch.groups * checked.channels * (lncc.items_together() ? 1 : items);
  const int64_t wanted = std::max<int64_t>(1, num_threads() / std::max<int64_t>(1, outer));
  // Planes that are computed together are the same ones for any number of slabs.
  const int64_t least = std::max<int64_t>(
      {1, (nz + wanted - 1) / wanted, std::min<int64_t>(nz, 2 * lncc.window.radius_z)});
  const int64_t slab = (least + kTogether - 1) / kTogether * kTogether;
  const int64_t slabs = (nz + slab - 1) / slab;
  parallel_for(outer * slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t index = task / slabs;
      const int64_t channel = index % checked.channels;
      index /= checked.channels;
      const int64_t group = lncc.items_together() ? index : index / items;
      const int64_t first = lncc.items_together() ? 0 : index % items;
      const int64_t last = lncc.items_together() ? items : first + 1;
      const int low = static_cast<int>(task % slabs * slab);
      const int high = static_cast<int>(std::min<int64_t>(nz, low + slab));
      Slab<T, kFields> worker(lncc, scale[group], group, channel);
      for (int64_t item = first; item < last; ++item) {
        double* plane_sums =
            sums.empty() ? nullptr
                         : sums.data() + ((group * items + item) * checked.channels + channel) * nz;
        with_vector_code([&] { worker.run(item, low, high, item == first, plane_sums); });
      }
    }
  });
}

// Σ mask over the map of the correlations, which the mask is broadcast to.
template <class T>
double mask_sum(const LnccOperands<T>& lncc, int64_t group) {
  const LnccCall& checked = lncc.checked;
  double total = 0;
  for (int64_t item = 0; item < checked.batch.items; ++item) {
    for (int64_t channel = 0; channel < checked.channels; ++channel) {
      const T* mask = lncc.mask.at(group, item, channel);
      for (int64_t row = 0; row < checked.sizes.rows(); ++row) {
        double sum = 0;
        for (int64_t x = 0; x < checked.sizes.x; ++x) sum += mask[row * checked.sizes.x + x];
        total += sum;
      }
    }
  }
  return total;
}

template <class T>
void run_lncc(const Cpu& device, const LnccOperands<T>& lncc, const Call& call) {
  const LnccCall& checked = lncc.checked;
  const int64_t groups = checked.batch.groups;
  const bool is_map = checked.reduction == Reduction::kNone;
  std::vector<T> scale(groups, T(-1));
  if (checked.reduction == Reduction::kMean) {
    const bool is_given = lncc.given_sum != nullptr;
    const bool weighted = lncc.mask.present() && !is_given;
    for (int64_t group = 0; group < groups; ++group) {
      const double count = is_given   ? static_cast<double>(lncc.given_sum[group])
                           : weighted ? mask_sum(lncc, group)
                                      : static_cast<double>(lncc.count());
      if (weighted) call.output("mask_sum").as<T>()[group] = static_cast<T>(count);
      scale[group] = static_cast<T>(count > 0 ? -1 / count : 0);
    }
  }
  std::vector<double> sums;
  const int64_t planes = checked.batch.items * checked.channels * checked.sizes.z;
  if (!is_map) sums.resize(groups * planes);
  if (checked.map.count() > 0) {
    if (lncc.gradients == 0) {
      run_slabs<T, 0>(lncc, scale, sums);
    } else if (lncc.gradients == 1) {
      run_slabs<T, 3>(lncc, scale, sums);
    } else {
      run_slabs<T, 5>(lncc, scale, sums);
    }
  } else {
    clear_gradients(device, call);
  }
  if (is_map) return;
  T* loss = call.output("output").as<T>();
  for (int64_t group = 0; group < groups; ++group) {
    double total = 0;
    for (int64_t i = 0; i < planes; ++i) total += sums[group * planes + i];
    loss[group] = static_cast<T>(scale[group] * total);
  }
}

}  // namespace

void lncc_loss_share_cpu(const Context& context, const Call& call) {
  with_lncc_loss_share(call, [&](const auto& lncc) { run_lncc(Cpu(context), lncc, call); });
}
void lncc_loss_cpu(const Context& context, const Call& call) {
  with_lncc_loss(call, [&](const auto& lncc) { run_lncc(Cpu(context), lncc, call); });
}
void lncc_loss_grad_cpu(const Context& context, const Call& call) {
  with_lncc_loss_grad(call, [&](const auto& lncc) { run_lncc(Cpu(context), lncc, call); });
}

}  // namespace regkernels
