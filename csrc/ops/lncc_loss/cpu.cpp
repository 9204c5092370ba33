#include <algorithm>
#include <cmath>
#include <vector>

#include "core/for_each.h"
#include "core/reduce.h"
#include "ops/lncc_loss/kernels.h"

namespace reg {

namespace {

// Calls body(IntTag<radius>) for the common radii, so that the loops over a window's taps are
// unrolled and those over voxels become vector code; IntTag<0> for any other.
template <class Body>
void dispatch_radius(int radius, const Body& body) {
  switch (radius) {
    case 1:
      return body(IntTag<1>{});
    case 2:
      return body(IntTag<2>{});
    case 3:
      return body(IntTag<3>{});
    case 4:
      return body(IntTag<4>{});
    default:
      return body(IntTag<0>{});
  }
}

// out[x] = Σ_d weight[|d|] row_d[x], over the rows from -radius to radius. Every sum is taken in
// the same order: from the middle outwards.
template <int kRadius, class T>
void weigh_rows(const T* const* rows, const T* weight, int radius, int64_t count, T* out) {
  if constexpr (kRadius > 0) {
    const T* row[2 * kRadius + 1];
    for (int d = 0; d <= 2 * kRadius; ++d) row[d] = rows[d];
#pragma GCC ivdep
    for (int64_t x = 0; x < count; ++x) {
      T sum = weight[0] * row[kRadius][x];
      for (int d = 1; d <= kRadius; ++d) {
        sum += weight[d] * (row[kRadius - d][x] + row[kRadius + d][x]);
      }
      out[x] = sum;
    }
  } else {
    for (int64_t x = 0; x < count; ++x) out[x] = weight[0] * rows[radius][x];
    for (int d = 1; d <= radius; ++d) {
      const T* below = rows[radius - d];
      const T* above = rows[radius + d];
#pragma GCC ivdep
      for (int64_t x = 0; x < count; ++x) out[x] += weight[d] * (below[x] + above[x]);
    }
  }
}

// Window sums within a plane. Rows are padded by the radius on either side, and so is the plane.
template <class T>
struct Plane {
  int radius, size_x, size_y;
  int64_t stride;  // elements in a padded row
  std::vector<T> data;

  Plane(int r, int nx, int ny, T padding)
      : radius(r),
        size_x(nx),
        size_y(ny),
        stride(nx + 2 * r),
        data(stride * (ny + 2 * r), padding) {}
  T* row(int y) { return data.data() + (y + radius) * stride; }  // padding included

  // The sums at row y, over y first.
  void sum_row(int y, const T* weight, T* scratch, T* out) {
    const T* rows[kMaxWindow];
    for (int d = -radius; d <= radius; ++d) rows[d + radius] = row(y + d);
    dispatch_radius(radius, [&](auto tag) {
      constexpr int kRadius = decltype(tag)::value;
      weigh_rows<kRadius>(rows, weight, radius, stride, scratch);
      const T* shifted[kMaxWindow];
      for (int d = 0; d <= 2 * radius; ++d) shifted[d] = scratch + d;
      weigh_rows<kRadius>(shifted, weight, radius, size_x, out);
    });
  }
};

template <class T>
void add_products(T weight, T i, T j, T (&sums)[kWindowSums]) {
  const T weighted_i = weight * i, weighted_j = weight * j;
  sums[0] += weighted_i;
  sums[1] += weighted_j;
  sums[2] += weighted_i * i;
  sums[3] += weighted_j * j;
  sums[4] += weighted_i * j;
}

// Sums over z of a row's values and their products, about the pivots: for each voxel of the row the
// five sums, from the planes -radius to radius.
template <int kRadius, class T>
void weigh_products(const T* const* rows_i, const T* const* rows_j, const T* weight, int radius,
                    T pivot_i, T pivot_j, int count, T* const (&out)[kWindowSums]) {
  T* const out_i = out[0];
  T* const out_j = out[1];
  T* const out_ii = out[2];
  T* const out_jj = out[3];
  T* const out_ij = out[4];
  const auto store = [=](int x, const T(&sums)[kWindowSums]) {
    out_i[x] = sums[0];
    out_j[x] = sums[1];
    out_ii[x] = sums[2];
    out_jj[x] = sums[3];
    out_ij[x] = sums[4];
  };
  if constexpr (kRadius > 0) {
    constexpr int kRows = 2 * kRadius + 1;
    const T *row_i[kRows], *row_j[kRows];
    for (int d = 0; d < kRows; ++d) {
      row_i[d] = rows_i[d];
      row_j[d] = rows_j[d];
    }
#pragma GCC ivdep
    for (int x = 0; x < count; ++x) {
      T sums[kWindowSums] = {};
      for (int d = 0; d < kRows; ++d) {
        const T w = weight[d < kRadius ? kRadius - d : d - kRadius];
        add_products(w, row_i[d][x] - pivot_i, row_j[d][x] - pivot_j, sums);
      }
      store(x, sums);
    }
  } else {
    for (T* sums : out) std::fill(sums, sums + count, T(0));
    for (int d = 0; d <= 2 * radius; ++d) {
      const T w = weight[std::abs(d - radius)];
      const T* const row_i = rows_i[d];
      const T* const row_j = rows_j[d];
#pragma GCC ivdep
      for (int x = 0; x < count; ++x) {
        T sums[kWindowSums] = {out_i[x], out_j[x], out_ii[x], out_jj[x], out_ij[x]};
        add_products(w, row_i[x] - pivot_i, row_j[x] - pivot_j, sums);
        store(x, sums);
      }
    }
  }
}

// A value that is typical of an image: the mean of some of its voxels.
template <class T>
T typical(const T* image, int64_t count) {
  constexpr int64_t kSamples = 1024;
  const int64_t step = std::max<int64_t>(1, count / kSamples);
  double sum = 0;
  int64_t samples = 0;
  for (int64_t i = step / 2; i < count; i += step) {
    if (std::isfinite(image[i])) {
      sum += image[i];
      ++samples;
    }
  }
  return static_cast<T>(samples > 0 ? sum / samples : 0);
}

// The correlations and gradients of the planes [begin, end) of one image's channel.
template <class T, int kFields>
class Slab {
 public:
  Slab(const LnccCall<T>& call, T scale, int64_t group, int64_t channel)
      : call_(call),
        window_(call.window),
        sizes_(call.geometry.sizes),
        scale_(scale),
        group_(group),
        channel_(channel),
        nx_(static_cast<int>(sizes_.x)),
        ny_(static_cast<int>(sizes_.y)),
        nz_(static_cast<int>(sizes_.z)) {}

  // `plane_sums`: for each z, where to put Σ weight ncc of the plane, or null.
  void run(int64_t item, int begin, int end, bool first_item, double* plane_sums) {
    const T* image_i = call_.image_i.at(group_, item, channel_);
    const T* image_j = call_.image_j.at(group_, item, channel_);
    const int64_t plane = static_cast<int64_t>(nx_) * ny_;
    const T pivot_i = pivot_near(typical(image_i, plane * nz_), window_);
    const T pivot_j = pivot_near(typical(image_j, plane * nz_), window_);
    const int radius_z = window_.radius_z;
    const int ring = 2 * radius_z + 1;
    prepare(pivot_i, pivot_j);

    const int reach = kFields > 0 ? radius_z : 0;
    for (int z = begin - reach; z < end + reach; ++z) {
      const bool exists = z >= 0 && z < nz_;
      const bool own = z >= begin && z < end;
      double sum = 0;
      if (exists) sum = correlate_plane(image_i, image_j, item, z, pivot_i, pivot_j, own);
      if (own && plane_sums != nullptr) plane_sums[z] = sum;
      if constexpr (kFields > 0) {
        T* slot = ring_.data() + ((z - begin + reach) % ring) * kFields * plane;
        if (exists) {
          for (int y = 0; y < ny_; ++y) {
            for (int f = 0; f < kFields; ++f) {
              adjoint_[f].sum_row(y, window_.weight, scratch_.data(),
                                  slot + f * plane + static_cast<int64_t>(y) * nx_);
            }
          }
        } else {
          std::fill(slot, slot + kFields * plane, T(0));
        }
        const int target = z - radius_z;
        if (target >= begin) {
          const T* planes[kMaxWindow];
          for (int d = 0; d < ring; ++d) {
            planes[d] = ring_.data() + ((target - begin + d) % ring) * kFields * plane;
          }
          assemble_plane(planes, image_i, image_j, item, target, pivot_i, pivot_j, first_item);
        }
      }
    }
  }

 private:
  static constexpr int kLanes = 16;

  void prepare(T pivot_i, T pivot_j) {
    // Outside the volume images are 0, that is -pivot; a row of the products' sums over z there.
    T mass = 0;
    for (int d = -window_.radius_z; d <= window_.radius_z; ++d) mass += window_.weight[std::abs(d)];
    const T padding[kWindowSums] = {-mass * pivot_i, -mass * pivot_j, mass * pivot_i * pivot_i,
                                    mass * pivot_j * pivot_j, mass * pivot_i * pivot_j};
    products_.clear();
    for (T value : padding) products_.emplace_back(window_.radius, nx_, ny_, value);
    sums_.resize(static_cast<size_t>(kWindowSums) * nx_);  // as many as adjoint fields at most
    scratch_.resize(nx_ + 2 * kMaxRadius);
    zeros_.resize(nx_);
    ncc_.resize((nx_ + kLanes - 1) / kLanes * kLanes);
    if constexpr (kFields > 0) {
      adjoint_.clear();
      for (int f = 0; f < kFields; ++f) adjoint_.emplace_back(window_.radius, nx_, ny_, T(0));
      ring_.resize(static_cast<size_t>(2 * window_.radius_z + 1) * kFields * nx_ * ny_);
    }
  }

  double correlate_plane(const T* image_i, const T* image_j, int64_t item, int z, T pivot_i,
                         T pivot_j, bool own) {
    for (int y = 0; y < ny_; ++y) {
      const T* rows_i[kMaxWindow];
      const T* rows_j[kMaxWindow];
      for (int d = -window_.radius_z; d <= window_.radius_z; ++d) {
        const bool exists = z + d >= 0 && z + d < nz_;
        const int64_t row = (static_cast<int64_t>(z + d) * ny_ + y) * nx_;
        rows_i[d + window_.radius_z] = exists ? image_i + row : zeros_.data();
        rows_j[d + window_.radius_z] = exists ? image_j + row : zeros_.data();
      }
      T* out[kWindowSums];
      for (int s = 0; s < kWindowSums; ++s) out[s] = products_[s].row(y) + window_.radius;
      dispatch_radius(window_.radius_z, [&](auto tag) {
        weigh_products<decltype(tag)::value>(rows_i, rows_j, window_.weight, window_.radius_z,
                                             pivot_i, pivot_j, nx_, out);
      });
    }
    double total = 0;
    for (int y = 0; y < ny_; ++y) {
      for (int s = 0; s < kWindowSums; ++s) {
        products_[s].sum_row(y, window_.weight, scratch_.data(), sums_.data() + s * nx_);
      }
      const int64_t row = (static_cast<int64_t>(z) * ny_ + y) * nx_;
      const T* mask = call_.mask.present() ? call_.mask.at(group_, item, channel_) + row : nullptr;
      const T* cotangent =
          call_.cotangent.present() ? call_.cotangent.at(group_, item, channel_) + row : nullptr;
      T* map = call_.map.present() ? call_.map.at(group_, item, channel_) + row : nullptr;
      correlate_row(y);
      for (int x = 0; x < nx_; ++x) {
        if (mask) ncc_[x] *= mask[x];
        if (map) map[x] = -ncc_[x];
      }
      if constexpr (kFields > 0) {
        for (int f = 0; f < kFields; ++f) {
          T* const fields = adjoint_[f].row(y) + window_.radius;
          if (mask && cotangent) {
            for (int x = 0; x < nx_; ++x) fields[x] *= mask[x] * cotangent[x];
          } else if (mask || cotangent) {
            const T* const factor = mask ? mask : cotangent;
            for (int x = 0; x < nx_; ++x) fields[x] *= factor[x];
          }
        }
      }
      // In lanes, since one sum after the other would wait for each addition.
      T lanes[kLanes] = {};
      for (size_t x = 0; x < ncc_.size(); x += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += ncc_[x + lane];
      }
      T row_sum = 0;
      for (const T lane : lanes) row_sum += lane;
      total += row_sum;
    }
    return own ? total : 0;
  }

  // The correlations and adjoint fields of a row, from its window sums.
  void correlate_row(int y) {
    const T* sums[kWindowSums];
    for (int s = 0; s < kWindowSums; ++s) sums[s] = sums_.data() + s * nx_;
    T* to[kFields == 0 ? 1 : kFields];
    for (int f = 0; f < kFields; ++f) to[f] = adjoint_[f].row(y) + window_.radius;
    T* const ncc = ncc_.data();
    const Window<T> window = window_;
#pragma GCC ivdep
    for (int x = 0; x < nx_; ++x) {
      const T here[] = {sums[0][x], sums[1][x], sums[2][x], sums[3][x], sums[4][x]};
      const Correlation<T> at = correlate(here, window);
      ncc[x] = at.ncc;
      if constexpr (kFields > 0) {
        T fields[kFields];
        adjoint_fields(at, at.mean_i, at.mean_j, fields);
        for (int f = 0; f < kFields; ++f) to[f][x] = fields[f];
      }
    }
  }

  void assemble_plane(const T* const* planes, const T* image_i, const T* image_j, int64_t item,
                      int z, T pivot_i, T pivot_j, bool first_item) {
    T* grad_i = call_.grad_i.at(group_, item, channel_);
    T* grad_j = kFields == 5 ? call_.grad_j.at(group_, item, channel_) : nullptr;
    for (int y = 0; y < ny_; ++y) {
      const int64_t in_plane = static_cast<int64_t>(y) * nx_;
      const int64_t row = static_cast<int64_t>(z) * ny_ * nx_ + in_plane;
      for (int f = 0; f < kFields; ++f) {
        const T* rows[kMaxWindow];
        for (int d = 0; d <= 2 * window_.radius_z; ++d) {
          rows[d] = planes[d] + static_cast<int64_t>(f) * ny_ * nx_ + in_plane;
        }
        weigh_depth(rows, sums_.data() + f * nx_);
      }
      for (int x = 0; x < nx_; ++x) {
        const T i = image_i[row + x] - pivot_i, j = image_j[row + x] - pivot_j;
        const T* s = sums_.data() + x;
        const T value = scale_ * assemble(i, j, s[0], s[nx_], s[2 * nx_]);
        grad_i[row + x] = call_.sum_i && !first_item ? grad_i[row + x] + value : value;
        if constexpr (kFields == 5) {
          const T other = scale_ * assemble(j, i, s[0], s[3 * nx_], s[4 * nx_]);
          grad_j[row + x] = call_.sum_j && !first_item ? grad_j[row + x] + other : other;
        }
      }
    }
  }

  void weigh_depth(const T* const* rows, T* out) {
    if (window_.radius_z == 0) {
      for (int x = 0; x < nx_; ++x) out[x] = window_.weight[0] * rows[0][x];
      return;
    }
    dispatch_radius(window_.radius_z, [&](auto tag) {
      weigh_rows<decltype(tag)::value>(rows, window_.weight, window_.radius_z, nx_, out);
    });
  }

  const LnccCall<T>& call_;
  const Window<T>& window_;
  const Sizes& sizes_;
  T scale_;
  int64_t group_, channel_;
  int nx_, ny_, nz_;
  std::vector<Plane<T>> products_, adjoint_;
  std::vector<T> sums_, scratch_, ring_;
  std::vector<T> ncc_;    // a row of correlations, and zeros up to a multiple of kLanes
  std::vector<T> zeros_;  // a row outside of the volume
};

// Compiled for newer instruction sets as well, and chosen between when the module is loaded. All of
// them compute the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define REG_FOR_NEWER_CPUS __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
#else
#define REG_FOR_NEWER_CPUS
#endif

#define REG_RUN_SLAB(T, kFields)                                                             \
  REG_FOR_NEWER_CPUS void run_slab(Slab<T, kFields>& slab, int64_t item, int begin, int end, \
                                   bool first_item, double* plane_sums) {                    \
    slab.run(item, begin, end, first_item, plane_sums);                                      \
  }
REG_RUN_SLAB(float, 0)
REG_RUN_SLAB(float, 3)
REG_RUN_SLAB(float, 5)
REG_RUN_SLAB(double, 0)
REG_RUN_SLAB(double, 3)
REG_RUN_SLAB(double, 5)
#undef REG_RUN_SLAB

template <class T, int kFields>
void run_slabs(const LnccCall<T>& call, const std::vector<T>& scale, std::vector<double>& sums) {
  const LnccGeometry& geometry = call.geometry;
  const int64_t nz = geometry.sizes.z;
  const int64_t items = geometry.batch.items;
  const int64_t outer =
      geometry.batch.groups * geometry.channels * (call.items_together() ? 1 : items);
  const int64_t wanted = std::max<int64_t>(1, num_threads() / std::max<int64_t>(1, outer));
  const int64_t slab = std::max<int64_t>(
      {1, (nz + wanted - 1) / wanted, std::min<int64_t>(nz, 2 * call.window.radius_z)});
  const int64_t slabs = (nz + slab - 1) / slab;
  parallel_for(outer * slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t index = task / slabs;
      const int64_t channel = index % geometry.channels;
      index /= geometry.channels;
      const int64_t group = call.items_together() ? index : index / items;
      const int64_t first = call.items_together() ? 0 : index % items;
      const int64_t last = call.items_together() ? items : first + 1;
      const int low = static_cast<int>(task % slabs * slab);
      const int high = static_cast<int>(std::min<int64_t>(nz, low + slab));
      Slab<T, kFields> worker(call, scale[group], group, channel);
      for (int64_t item = first; item < last; ++item) {
        double* plane_sums =
            sums.empty()
                ? nullptr
                : sums.data() + ((group * items + item) * geometry.channels + channel) * nz;
        run_slab(worker, item, low, high, item == first, plane_sums);
      }
    }
  });
}

// Σ mask over the map, which it is broadcast to.
template <class T>
double mask_sum(const LnccCall<T>& call, int64_t group) {
  const LnccGeometry& geometry = call.geometry;
  double total = 0;
  for (int64_t item = 0; item < geometry.batch.items; ++item) {
    for (int64_t channel = 0; channel < geometry.channels; ++channel) {
      const T* mask = call.mask.at(group, item, channel);
      for (int64_t row = 0; row < geometry.sizes.rows(); ++row) {
        double sum = 0;
        for (int64_t x = 0; x < geometry.sizes.x; ++x) sum += mask[row * geometry.sizes.x + x];
        total += sum;
      }
    }
  }
  return total;
}

template <class T>
void lncc_run(const Cpu& device, const LnccCall<T>& call, const Call& raw) {
  const LnccGeometry& geometry = call.geometry;
  const int64_t groups = geometry.batch.groups;
  const bool is_map = geometry.reduction == Reduction::kNone;
  std::vector<T> scale(groups, T(-1));
  if (geometry.reduction == Reduction::kMean) {
    const bool weighted = call.mask.present();
    for (int64_t group = 0; group < groups; ++group) {
      const double count = weighted ? mask_sum(call, group) : static_cast<double>(call.count());
      if (weighted) raw.output("mask_sum").as<T>()[group] = static_cast<T>(count);
      scale[group] = static_cast<T>(count > 0 ? -1 / count : 0);
    }
  }
  std::vector<double> sums;
  const int64_t planes = geometry.batch.items * geometry.channels * geometry.sizes.z;
  if (!is_map) sums.resize(groups * planes);
  if (geometry.map.count() > 0) {
    if (call.gradients == 0) {
      run_slabs<T, 0>(call, scale, sums);
    } else if (call.gradients == 1) {
      run_slabs<T, 3>(call, scale, sums);
    } else {
      run_slabs<T, 5>(call, scale, sums);
    }
  } else {
    for (const char* name : {"grad_pred", "grad_target"}) {
      if (raw.output(name).present) clear(device, raw.output(name));
    }
  }
  if (is_map) return;
  T* loss = raw.output("output").as<T>();
  for (int64_t group = 0; group < groups; ++group) {
    double total = 0;
    for (int64_t i = 0; i < planes; ++i) total += sums[group * planes + i];
    loss[group] = static_cast<T>(scale[group] * total);
  }
}

}  // namespace

void lncc_loss_cpu(const Context& context, const Call& call) {
  with_lncc_loss(call, [&](const auto& lncc) { lncc_run(Cpu(context), lncc, call); });
}
void lncc_loss_grad_cpu(const Context& context, const Call& call) {
  with_lncc_loss_grad(call, [&](const auto& lncc) { lncc_run(Cpu(context), lncc, call); });
}

}  // namespace reg
