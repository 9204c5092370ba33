// Per-voxel maths of linear and nearest sampling: boundary rules, corner weights, derivatives.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"
#include "core/vec.h"

namespace reg {

enum class Mode { kBilinear, kNearest };
enum class Padding { kZeros, kBorder, kReflection };

// How positions become voxels. Plain run-time values: the branches are the same for every voxel,
// and fewer template instantiations keep builds short.
struct Sampling {
  Mode mode;
  Padding padding;
  bool align_corners;
};

// Along one axis: the voxels `index` and `index + 1`, the weight of each (0 where it lies outside),
// whether each exists at all, and the derivative of the in-volume coordinate with respect to the
// position: 1, -1 where reflected, 0 where clamped.
template <class T>
struct Cell {
  int index;
  T weight[2];
  bool inside[2];
  T slope;
};

// Not std::floor, which without SSE4.1 is a library call on the CPU.
REG_HD float fast_floor(float p) {
#ifdef __CUDA_ARCH__
  return floorf(p);
#else
  const float f = static_cast<float>(static_cast<int>(p));
  return f > p ? f - 1 : f;
#endif
}
REG_HD double fast_floor(double p) {
#ifdef __CUDA_ARCH__
  return floor(p);
#else
  const double f = static_cast<double>(static_cast<int>(p));
  return f > p ? f - 1 : f;
#endif
}
REG_HD float round_half_even(float p) { return rintf(p); }
REG_HD double round_half_even(double p) { return rint(p); }

// Reflects p into the volume. `mirrored` tells that the coordinate now runs backwards.
template <class T>
REG_HD T reflect(T p, int n, bool align_corners, bool* mirrored) {
  const T low = align_corners ? T(0) : T(-0.5);
  const T span = align_corners ? T(n - 1) : T(n);
  if (!(span > 0)) {
    *mirrored = false;
    return 0;
  }
  T t = p - low;
  if (t < 0 || t >= span) {  // inside, p passes through untouched and so exactly
    t -= 2 * span * floor(t / (2 * span));
    *mirrored = t >= span;
    return (*mirrored ? 2 * span - t : t) + low;
  }
  *mirrored = false;
  return p;
}

// A position that is not a number or infinite samples as outside: zero, or the clamped voxel.
template <class T>
REG_HD Cell<T> locate(T p, int n, const Sampling& sampling) {
  Cell<T> cell;
  cell.slope = 1;
  bool mirrored = false;
  const T last = static_cast<T>(n - 1);
  if (sampling.padding == Padding::kZeros) {
    // Far outside is as good as just outside, and safe to turn into an integer.
    p = p > T(-2) ? p : T(-2);
    p = p < T(n + 1) ? p : T(n + 1);
  } else {
    if (sampling.padding == Padding::kReflection) {
      p = reflect(p, n, sampling.align_corners, &mirrored);
      if (mirrored) cell.slope = -1;
    }
    // The derivative is the right-sided one: at the last voxel it is that of the clamp, at the
    // first one that of the image (the other way round where the coordinate runs backwards).
    if (!(p >= 0) || (mirrored && p == 0)) {
      p = 0;
      cell.slope = 0;
    }
    if (p > last || (!mirrored && p == last)) {
      p = last;
      cell.slope = 0;
    }
  }
  T floor_p;
  if (sampling.mode == Mode::kNearest) {
    p = floor_p = round_half_even(p);
    cell.slope = 0;
  } else {
    floor_p = fast_floor(p);
    // Right-sided derivatives of a coordinate that runs backwards look at the cell on the left.
    if (mirrored && floor_p == p && p > 0) floor_p -= 1;
  }
  const T fraction = p - floor_p;
  cell.index = static_cast<int>(floor_p);
  cell.inside[0] = cell.index >= 0 && cell.index < n;
  cell.inside[1] = cell.index >= -1 && cell.index < n - 1;
  cell.weight[0] = cell.inside[0] ? 1 - fraction : T(0);
  cell.weight[1] = cell.inside[1] ? fraction : T(0);
  return cell;
}

// The 2^D voxels around a position. Bit k of a corner's number picks the upper voxel of axis k
// (x, y, z). A corner of weight 0 must not be read: it may lie outside, and a NaN there is none of
// this sample's business.
template <class T, int D>
struct Neighbourhood {
  static constexpr int kCorners = 1 << D;
  Cell<T> axis[D];
  int64_t base;       // offset of corner 0 in voxels; meaningless where that corner is outside
  int64_t stride[D];  // in voxels, x, y, z

  REG_HD int64_t offset(int corner) const {
    int64_t result = base;
    REG_UNROLL
    for (int k = 0; k < D; ++k) {
      if (corner >> k & 1) result += stride[k];
    }
    return result;
  }
  REG_HD T weight(int corner) const {
    T result = axis[0].weight[corner & 1];
    REG_UNROLL
    for (int k = 1; k < D; ++k) result *= axis[k].weight[corner >> k & 1];
    return result;
  }
  REG_HD bool inside(int corner) const {
    bool result = true;
    REG_UNROLL
    for (int k = 0; k < D; ++k) result = result && axis[k].inside[corner >> k & 1];
    return result;
  }
};

template <class T, int D>
REG_HD Neighbourhood<T, D> neighbourhood(const Vec<T, D>& p, const int (&size)[D],
                                         const Sampling& sampling) {
  Neighbourhood<T, D> result;
  int row = 0;  // row numbers fit 32 bits (checked), their products with the row length may not
  REG_UNROLL
  for (int k = D - 1; k >= 0; --k) {
    result.axis[k] = locate(p[k], size[k], sampling);
    if (k > 0) row = row * size[k] + result.axis[k].index;
  }
  result.base = static_cast<int64_t>(row) * size[0] + result.axis[0].index;
  result.stride[0] = 1;
  REG_UNROLL
  for (int k = 1; k < D; ++k) result.stride[k] = result.stride[k - 1] * size[k - 1];
  return result;
}

// The place of a sample whose corners all lie inside and all count. Nearly every sample is one, and
// no boundary rule applies to it: these few lines are what the kernels spend their time in.
template <class T, int D>
struct InnerCell {
  Vec<int, D> index;   // the voxel of corner 0
  Vec<T, D> fraction;  // strictly between 0 and 1
};

// `limit` is the last position of each axis, or 0 where there are no inner cells (nearest
// sampling).
template <class T, int D>
REG_HD bool find_inner_cell(const Vec<T, D>& p, const Vec<T, D>& limit, InnerCell<T, D>& cell) {
  bool inside = true;
  REG_UNROLL
  for (int k = 0; k < D; ++k) inside = inside & (p[k] > 0) & (p[k] < limit[k]);
#ifndef __CUDA_ARCH__
  if (!inside) return false;  // on CUDA a branch costs more than the few instructions it saves
#endif
  T product = 1;
  REG_UNROLL
  for (int k = 0; k < D; ++k) {
    cell.index[k] = static_cast<int>(p[k]);
    cell.fraction[k] = p[k] - static_cast<T>(cell.index[k]);
    product *= cell.fraction[k];
  }
  return inside & (product != 0);
}

// The same for a sample at the edge of a zero-padded volume: some corners lie outside and are 0.
// `limit` is the size of each axis, or -1 where there are no such cells (other padding or
// sampling).
template <class T, int D>
REG_HD bool find_edge_cell(const Vec<T, D>& p, const Vec<T, D>& limit, InnerCell<T, D>& cell) {
  bool near = true;
  REG_UNROLL
  for (int k = 0; k < D; ++k) near = near & (p[k] > T(-1)) & (p[k] < limit[k]);
#ifndef __CUDA_ARCH__
  if (!near) return false;
#endif
  T product = 1;
  REG_UNROLL
  for (int k = 0; k < D; ++k) {
    const T below = fast_floor(p[k]);
    cell.index[k] = static_cast<int>(below);
    cell.fraction[k] = p[k] - below;
    product *= cell.fraction[k];
  }
  return near & (product != 0);
}

template <class T, int D>
REG_HD T inner_weight(const InnerCell<T, D>& cell, int corner) {
  T result = 1;
  REG_UNROLL
  for (int k = 0; k < D; ++k) {
    result *= corner >> k & 1 ? cell.fraction[k] : 1 - cell.fraction[k];
  }
  return result;
}

template <class T>
REG_HD T lerp(T a, T b, T fraction) {
  return a + fraction * (b - a);
}

// The sample from the values at the corners: axis after axis, pairs become one.
template <class T, int D>
REG_HD T inner_value(const InnerCell<T, D>& cell, const T (&corners)[1 << D]) {
  T value[1 << D];
  REG_UNROLL
  for (int i = 0; i < (1 << D); ++i) value[i] = corners[i];
  REG_UNROLL
  for (int k = 0; k < D; ++k) {
    REG_UNROLL
    for (int i = 0; i < (1 << (D - 1 - k)); ++i) {
      value[i] = lerp(value[2 * i], value[2 * i + 1], cell.fraction[k]);
    }
  }
  return value[0];
}

// Its derivative with respect to the position, in the same way.
template <class T, int D>
REG_HD Vec<T, D> inner_gradient(const InnerCell<T, D>& cell, const T (&corners)[1 << D]) {
  T value[1 << D];
  T slope[D][1 << (D - 1)];
  REG_UNROLL
  for (int i = 0; i < (1 << D); ++i) value[i] = corners[i];
  REG_UNROLL
  for (int k = 0; k < D; ++k) {
    REG_UNROLL
    for (int i = 0; i < (1 << (D - 1 - k)); ++i) {
      REG_UNROLL
      for (int j = 0; j < k; ++j) {
        slope[j][i] = lerp(slope[j][2 * i], slope[j][2 * i + 1], cell.fraction[k]);
      }
      slope[k][i] = value[2 * i + 1] - value[2 * i];
      value[i] = lerp(value[2 * i], value[2 * i + 1], cell.fraction[k]);
    }
  }
  Vec<T, D> result;
  REG_UNROLL
  for (int k = 0; k < D; ++k) result[k] = slope[k][0];
  return result;
}

// Derivative of a sample with respect to the position, from the values at the corners (0 outside).
template <class T, int D>
REG_HD Vec<T, D> position_gradient(const Neighbourhood<T, D>& at, const T (&value)[1 << D]) {
  Vec<T, D> gradient;
  REG_UNROLL
  for (int k = 0; k < D; ++k) {
    T sum = 0;
    REG_UNROLL
    for (int corner = 0; corner < (1 << D); ++corner) {
      if (corner >> k & 1) continue;
      T others = 1;
      REG_UNROLL
      for (int j = 0; j < D; ++j) {
        if (j != k) others *= at.axis[j].weight[corner >> j & 1];
      }
      sum += others * (value[corner | 1 << k] - value[corner]);
    }
    gradient[k] = sum * at.axis[k].slope;
  }
  return gradient;
}

}  // namespace reg
