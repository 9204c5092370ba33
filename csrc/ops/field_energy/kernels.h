// What each kind of energy is at one voxel, and the derivative of the whole sum by the displacement
// there: a gather, in which neighbours' differences are computed again.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/operand.h"
#include "maths/differences.h"
#include "maths/matrix.h"
#include "maths/voxel_vectors.h"
#include "ops/field_energy/call.h"

namespace regkernels {

// ------------------------------------------------- kinds that treat each component by itself

// One component of a field about a voxel. `kInside`: no voxel that is asked for is outside, and
// nobody has to find out.
template <class Scalar, int D, bool kInside>
struct Component {
  using T = Scalar;
  static constexpr int kAxes = D;
  const T* here;
  const int64_t* stride;  // numbers to the next voxel, by axis
  const T* per_step;      // one over the length of a step, by axis
  const int* size;
  int index[D];

  // Whether all voxels from `first` to `last` steps along an axis are there.
  REGKERNELS_HD bool has(int axis, int first, int last) const {
    return kInside || (index[axis] + first >= 0 && index[axis] + last < size[axis]);
  }
  REGKERNELS_HD T value() const { return *here; }
  REGKERNELS_HD T value(int axis, int steps) const { return here[steps * stride[axis]]; }
  REGKERNELS_HD Component moved(int axis, int steps) const {
    Component result = *this;
    result.here += steps * stride[axis];
    if (!kInside) result.index[axis] += steps;
    return result;
  }
  // The difference of the next two voxels and the last two, per step squared.
  REGKERNELS_HD T second(int axis) const {
    const T w = per_step[axis];
    return w * w * ((value(axis, 1) - value()) - (value() - value(axis, -1)));
  }
  // That between the slopes along one axis of two voxels that are neighbours along another.
  REGKERNELS_HD T mixed(int a, int b) const {
    const Component next = moved(a, 1);
    const T slope = value(b, 1) - value();
    return per_step[a] * per_step[b] * ((next.value(b, 1) - next.value()) - slope);
  }
};

// Each of these has how far it looks, kReach, and adds to `energy` what the voxel's own differences
// contribute to the sum, and to `pull` half the derivative of the sum by the displacement.

// Squared forward differences. The last voxel of an axis has none.
struct DiffusionEnergy {
  static constexpr int kReach = 1;

  template <class Around, class T>
  REGKERNELS_HD static void add(const Around& u, T& energy, T& pull) {
    REGKERNELS_UNROLL
    for (int axis = 0; axis < Around::kAxes; ++axis) {
      const T w = u.per_step[axis];
      if (u.has(axis, 0, 1)) {
        const T slope = w * (u.value(axis, 1) - u.value());
        energy += slope * slope;
        pull -= w * slope;
      }
      if (u.has(axis, -1, 0)) pull += w * w * (u.value() - u.value(axis, -1));
    }
  }
};

// Squared second differences, those along two axes twice, wherever all voxels of one are there.
struct BendingEnergy {
  static constexpr int kReach = 2;

  template <class Around, class T>
  REGKERNELS_HD static void add(const Around& u, T& energy, T& pull) {
    REGKERNELS_UNROLL
    for (int a = 0; a < Around::kAxes; ++a) {
      const T w = u.per_step[a];
      T sum = 0;
      if (u.has(a, -1, 1)) {
        const T bend = u.second(a);
        energy += bend * bend;
        sum -= 2 * bend;
      }
      if (u.has(a, -2, 0)) sum += u.moved(a, -1).second(a);
      if (u.has(a, 0, 2)) sum += u.moved(a, 1).second(a);
      pull += w * w * sum;
      REGKERNELS_UNROLL
      for (int b = a + 1; b < Around::kAxes; ++b) {
        sum = 0;
        if (u.has(a, 0, 1) && u.has(b, 0, 1)) {
          const T twist = u.mixed(a, b);
          energy += 2 * twist * twist;
          sum += twist;
        }
        if (u.has(a, -1, 0) && u.has(b, 0, 1)) sum -= u.moved(a, -1).mixed(a, b);
        if (u.has(a, 0, 1) && u.has(b, -1, 0)) sum -= u.moved(b, -1).mixed(a, b);
        if (u.has(a, -1, 0) && u.has(b, -1, 0)) sum += u.moved(a, -1).moved(b, -1).mixed(a, b);
        pull += 2 * w * u.per_step[b] * sum;
      }
    }
  }
};

// The square of the Laplacian. An axis contributes to it where the voxel has two neighbours.
struct CurvatureEnergy {
  static constexpr int kReach = 2;

  template <class Around>
  REGKERNELS_HD static typename Around::T laplacian(const Around& u) {
    typename Around::T sum = 0;
    REGKERNELS_UNROLL
    for (int axis = 0; axis < Around::kAxes; ++axis) {
      if (u.has(axis, -1, 1)) sum += u.second(axis);
    }
    return sum;
  }

  template <class Around, class T>
  REGKERNELS_HD static void add(const Around& u, T& energy, T& pull) {
    const T own = laplacian(u);
    energy += own * own;
    REGKERNELS_UNROLL
    for (int axis = 0; axis < Around::kAxes; ++axis) {
      const T w = u.per_step[axis];
      T sum = 0;
      if (u.has(axis, -1, 1)) sum -= 2 * own;
      if (u.has(axis, -2, 0)) sum += laplacian(u.moved(axis, -1));
      if (u.has(axis, 0, 2)) sum += laplacian(u.moved(axis, 1));
      pull += w * w * sum;
    }
  }
};

template <class Scalar, int D, class Kind>
struct ComponentEnergy {
  using T = Scalar;
  static constexpr int kAxes = D;
  static constexpr int kReach = Kind::kReach;
  using EnergyOfComponent = Kind;

  Operand<const T> displacement;
  Operand<const T> cotangent;
  Operand<T> gradient;
  int size[D];
  int64_t stride[D];
  T per_step[D];
  T squared_unit[D];  // of each component, 0 for one that has no effect
  T scale;

  struct Row {
    const T* displacement;
    T* gradient;  // null: nobody asks for it
    T scale;      // of the gradient
  };

  REGKERNELS_HD Row row(int64_t group, int64_t item, int64_t z, int64_t y) const {
    const int64_t first = (z * size[1] + y) * stride[1];
    const T weight = cotangent.data == nullptr ? T(1) : *cotangent.at(group, item);
    return {displacement.at(group, item) + first,
            gradient.data == nullptr ? nullptr : gradient.at(group, item) + first,
            2 * scale * weight};
  }

  // A number of a row.
  template <bool kInside>
  REGKERNELS_HD Component<T, D, kInside> component(const Row& row, int z, int y, int e) const {
    Component<T, D, kInside> result{row.displacement + e, stride, per_step, size, {}};
    if (!kInside) {
      result.index[0] = e / D;
      result.index[1] = y;
      if constexpr (D == 3) result.index[2] = z;
    }
    return result;
  }
};

// ----------------------------------------------------- kinds that are about all components
// together

// Each of these gives the energy for the slopes of a displacement in voxels, and its derivative by
// each of them. One whose derivatives, gathered, make a short formula two voxels and more from the
// border says so by kHasPull, and has that formula.

// mu |e|^2 + lam / 2 tr(e)^2, where e is the symmetric part of the slopes.
template <class T, int D>
struct ElasticEnergy {
  static constexpr bool kHasPull = true;
  T mu, lam;
  T ratio[D][D];  // from slopes in voxels to slopes in mm
  // What `pull` multiplies by: the second differences of component k, two steps wide, along an
  // axis; and the mixed ones of another component, along the axes of both.
  T second[D][D], mixed[D][D];

  // A quarter of these is the coefficient's for central differences of central differences.
  void set_coefficients(const T (&half)[D]) {
    for (int k = 0; k < D; ++k) {
      for (int a = 0; a < D; ++a) {
        const T stiffness = k == a ? 2 * mu + lam : mu * ratio[k][a] * ratio[k][a];
        second[k][a] = T(0.25) * half[k] * half[k] * stiffness;
        mixed[k][a] = T(0.25) * half[k] * half[a] * (mu + lam);
      }
    }
  }

  // The mixed difference of component a at a voxel, along its axis and another: the numbers of the
  // voxel begin at `u`.
  REGKERNELS_HD static T twist(const T* u, int a, int64_t along_k, int64_t along_a) {
    return (u[a - along_a + along_k] - u[a - along_a - along_k]) -
           (u[a + along_a + along_k] - u[a + along_a - along_k]);
  }

  // The derivative of the sum over the volume by component k of a voxel.
  REGKERNELS_HD T pull(const T* u, const int64_t (&stride)[D], int k) const {
    T sum = 0;
    REGKERNELS_UNROLL
    for (int a = 0; a < D; ++a) {
      sum += second[k][a] * ((u[k] - u[k - 2 * stride[a]]) + (u[k] - u[k + 2 * stride[a]]));
      if (a != k) sum += mixed[k][a] * twist(u, a, stride[k], stride[a]);
    }
    return sum;
  }

  REGKERNELS_HD Matrix<T, D> strain(const Matrix<T, D>& slopes) const {
    Matrix<T, D> result;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      REGKERNELS_UNROLL
      for (int axis = 0; axis < D; ++axis) {
        result.m[k][axis] =
            T(0.5) * (ratio[k][axis] * slopes.m[k][axis] + ratio[axis][k] * slopes.m[axis][k]);
      }
    }
    return result;
  }
  REGKERNELS_HD static T trace(const Matrix<T, D>& a) {
    T sum = 0;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) sum += a.m[k][k];
    return sum;
  }
  REGKERNELS_HD T energy(const Matrix<T, D>& slopes) const {
    const Matrix<T, D> e = strain(slopes);
    T squares = 0;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      REGKERNELS_UNROLL
      for (int axis = 0; axis < D; ++axis) squares += e.m[k][axis] * e.m[k][axis];
    }
    const T t = trace(e);
    return mu * squares + T(0.5) * lam * t * t;
  }
  REGKERNELS_HD Matrix<T, D> derivative(const Matrix<T, D>& slopes) const {
    Matrix<T, D> e = strain(slopes);
    const T pressure = lam * trace(e);
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      REGKERNELS_UNROLL
      for (int axis = 0; axis < D; ++axis) {
        e.m[k][axis] = ratio[k][axis] * (2 * mu * e.m[k][axis] + (k == axis ? pressure : T(0)));
      }
    }
    return e;
  }
};

// The square of the divergence.
template <class T, int D>
struct DivergenceEnergy {
  static constexpr bool kHasPull = true;
  T half[D];  // what a difference two steps wide is multiplied by

  void set_coefficients(const T (&of_slopes)[D]) {
    for (int k = 0; k < D; ++k) half[k] = T(0.5) * of_slopes[k];
  }

  // At a voxel whose numbers begin at `u`.
  REGKERNELS_HD T central(const T* u, const int64_t (&stride)[D]) const {
    T sum = 0;
    REGKERNELS_UNROLL
    for (int a = 0; a < D; ++a) sum += half[a] * (u[a + stride[a]] - u[a - stride[a]]);
    return sum;
  }
  // The derivative of the sum over the volume by component k of a voxel.
  REGKERNELS_HD T pull(const T* u, const int64_t (&stride)[D], int k) const {
    return 2 * half[k] * (central(u - stride[k], stride) - central(u + stride[k], stride));
  }

  REGKERNELS_HD static T divergence(const Matrix<T, D>& slopes) {
    T sum = 0;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) sum += slopes.m[k][k];
    return sum;
  }
  REGKERNELS_HD T energy(const Matrix<T, D>& slopes) const {
    const T sum = divergence(slopes);
    return sum * sum;
  }
  REGKERNELS_HD Matrix<T, D> derivative(const Matrix<T, D>& slopes) const {
    Matrix<T, D> result{};
    const T twice = 2 * divergence(slopes);
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) result.m[k][k] = twice;
    return result;
  }
};

// The square of the logarithm of the determinant of x + u(x). Where the determinant is less than
// kLeast, down to what folds, the curve goes on as its tangent, so that there is always a slope to
// climb.
template <class T, int D>
struct DeterminantEnergy {
  static constexpr bool kHasPull = false;
  static constexpr double kLeast = 0.05;
  T at_least, slope_at_least;  // log(kLeast)^2, and its derivative

  REGKERNELS_HD T energy(const Matrix<T, D>& slopes) const {
    const T det = determinant(plus_identity(slopes));
    if (det < T(kLeast)) return at_least + slope_at_least * (det - T(kLeast));
    const T logarithm = std::log(det);
    return logarithm * logarithm;
  }
  REGKERNELS_HD Matrix<T, D> derivative(const Matrix<T, D>& slopes) const {
    const Matrix<T, D> jacobian = plus_identity(slopes);
    const T det = determinant(jacobian);
    const T slope = det < T(kLeast) ? slope_at_least : 2 * std::log(det) / det;
    Matrix<T, D> result;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      REGKERNELS_UNROLL
      for (int axis = 0; axis < D; ++axis) result.m[k][axis] = slope * cofactor(jacobian, k, axis);
    }
    return result;
  }
};

template <class Scalar, int D, class Kind>
struct SlopeEnergy {
  using T = Scalar;
  static constexpr int kAxes = D;

  using EnergyOfSlopes = Kind;

  Differences<T, D> differences;
  int64_t stride[D];  // numbers to the next voxel, by axis
  Kind kind;
  Operand<const T> displacement;
  Operand<const T> cotangent;
  Operand<T> gradient;
  T scale;

  struct Element {
    const SlopeEnergy* self;
    const T* displacement;
    T* gradient;  // null: nobody asks for it
    T scale;      // of the gradient

    // Whether a voxel is two voxels and more from both ends of the axes from a first one on.
    REGKERNELS_HD bool far_from_border(const Vec<int, D>& i, int first_axis = 0) const {
      bool far = true;
      REGKERNELS_UNROLL
      for (int a = first_axis; a < D; ++a) {
        far = far && i[a] >= 2 && i[a] + 2 < self->differences.frame.size[a];
      }
      return far;
    }
    // Whether a voxel has to gather the gradient near one of the ends of its row alone.
    REGKERNELS_HD bool at_row_end(const Vec<int, D>& i) const {
      return far_from_border(i, 1) && !far_from_border(i);
    }

    // The derivative of the sum over the volume by the displacement at a voxel. The numbers of a
    // voxel j begin at at(j).
    template <class At>
    REGKERNELS_HD Vec<T, D> gathered_from(const At& at, const Vec<int, D>& i) const {
      const Differences<T, D>& d = self->differences;
      Vec<T, D> sum{};
      d.for_each_use(i, [&](const Vec<int, D>& j, int axis, T weight) {
        const Matrix<T, D> slope = self->kind.derivative(d.slopes_from(at, j));
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          if (d.frame.half[k] != 0) sum[k] += weight * d.frame.half[k] * slope.m[k][axis];
        }
      });
      return sum;
    }
    REGKERNELS_HD Vec<T, D> gathered(const Vec<int, D>& i) const {
      return gathered_from(
          [&](const Vec<int, D>& j) { return displacement + self->differences.offset(j) * D; }, i);
    }

    // Where there is a formula, few voxels gather.
    REGKERNELS_HD_APART static Vec<T, D> gathered_apart(const Element element,
                                                        const Vec<int, D> i) {
      return element.gathered(i);
    }

    REGKERNELS_HD void store_gathered(const Vec<int, D>& i) const {
      const Vec<T, D> sum = gathered_apart(*this, i);
      T* const to = gradient + self->differences.offset(i) * D;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) to[k] = sum[k] * scale;
    }

    // Returns the energy of the voxel. Every lane of the warp must take part. Where `row_ends` is
    // not set, somebody else stores the gradient there afterwards.
    REGKERNELS_HD T operator()(const Voxel& voxel, bool row_ends = true) const {
      const Differences<T, D>& d = self->differences;
      const Vec<int, D> i = voxel_index<D>(voxel);
      const T energy = self->kind.energy(d.slopes(displacement, i));
      if (gradient != nullptr) {
        Vec<T, D> sum{};
        if constexpr (Kind::kHasPull) {
          if (far_from_border(i)) {
            REGKERNELS_UNROLL
            for (int k = 0; k < D; ++k) {
              sum[k] = self->kind.pull(displacement + d.offset(i) * D, self->stride, k);
            }
          } else if (row_ends || !at_row_end(i)) {
            sum = gathered_apart(*this, i);
          }
        } else {
          sum = gathered(i);
        }
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) sum[k] *= scale;
        store_packed(gradient + voxel.row(d.frame.size) * D, voxel, sum);
      }
      return energy;
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const T weight = cotangent.data == nullptr ? T(1) : *cotangent.at(group, item);
    return {this, displacement.at(group, item),
            gradient.data == nullptr ? nullptr : gradient.at(group, item), scale * weight};
  }
};

// ------------------------------------------------------------------------------------- a call

template <class T, int D, class Kind>
ComponentEnergy<T, D, Kind> component_energy(const Call& call) {
  const auto& checked = call.checked<FieldEnergyCall>();
  const int64_t extent[3] = {checked.sizes.x, checked.sizes.y, checked.planes};
  ComponentEnergy<T, D, Kind> body{};
  int64_t stride = D;
  for (int k = 0; k < D; ++k) {
    const double half = half_extent(extent[k], call.flag("align_corners"));
    body.size[k] = static_cast<int>(extent[k]);
    body.stride[k] = stride;
    stride *= extent[k];
    body.per_step[k] = static_cast<T>(1 / checked.spacing[k]);
    const double unit = half * checked.spacing[k];
    body.squared_unit[k] = static_cast<T>(unit * unit);
  }
  return body;
}

template <class T, int D, class Kind>
SlopeEnergy<T, D, Kind> slope_energy(const Call& call, const Kind& kind) {
  const auto& checked = call.checked<FieldEnergyCall>();
  const int64_t extent[3] = {checked.sizes.x, checked.sizes.y, checked.planes};
  SlopeEnergy<T, D, Kind> body{};
  body.differences = {make_frame<T, D>(extent, call.flag("align_corners"))};
  int64_t stride = D;
  for (int k = 0; k < D; ++k) {
    body.stride[k] = stride;
    stride *= extent[k];
  }
  body.kind = kind;
  if constexpr (Kind::kHasPull) body.kind.set_coefficients(body.differences.frame.half);
  return body;
}

// The planes of a call within the whole volume, which bodies are of: their numbers there, and the
// sizes that bodies have, tell what is at the border.
struct OwnPlanes {
  FirstPlane first;
  int in_volume;

  explicit OwnPlanes(const Call& call)
      : first(call.slab), in_volume(static_cast<int>(call.checked<FieldEnergyCall>().planes)) {}
};

// Calls run(body, space) with the kind of energy that a call asks for, of its type and number of
// dimensions, and the space of its own voxels, the first of which is where a body's arrays begin;
// for those by component, a row is one of numbers.
template <class Body>
void with_field_energy(const Call& call, const Body& run) {
  const auto& checked = call.checked<FieldEnergyCall>();
  VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, checked.sizes);
  if (by_component(checked.kind)) space.x *= checked.dimensions;
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      constexpr int D = decltype(dimensions)::value;
      const auto run_with = [&](auto body) {
        body.displacement = Operand<const T>(call.input("displacement"));
        body.gradient = Operand<T>(call.output("grad_displacement"));
        if (call.slab.present()) {
          const int64_t halo = kEnergyHalo * checked.sizes.y * checked.sizes.x * D;
          body.displacement.data += halo;
          if (checked.gradient_has_halo && body.gradient.data != nullptr) {
            body.gradient.data += halo;
          }
        }
        body.scale = static_cast<T>(checked.scale());
        if (checked.is_gradient) body.cotangent = Operand<const T>(call.input("grad_output"));
        run(body, space);
      };
      switch (checked.kind) {
        case EnergyKind::kDiffusion:
          return run_with(component_energy<T, D, DiffusionEnergy>(call));
        case EnergyKind::kBending:
          return run_with(component_energy<T, D, BendingEnergy>(call));
        case EnergyKind::kCurvature:
          return run_with(component_energy<T, D, CurvatureEnergy>(call));
        case EnergyKind::kElasticity: {
          ElasticEnergy<T, D> kind{};
          kind.mu = static_cast<T>(checked.mu);
          kind.lam = static_cast<T>(checked.lam);
          for (int k = 0; k < D; ++k) {
            for (int axis = 0; axis < D; ++axis) {
              kind.ratio[k][axis] = static_cast<T>(checked.spacing[k] / checked.spacing[axis]);
            }
          }
          return run_with(slope_energy<T, D>(call, kind));
        }
        case EnergyKind::kDivergence:
          return run_with(slope_energy<T, D>(call, DivergenceEnergy<T, D>{}));
        case EnergyKind::kJacobian: {
          const double least = DeterminantEnergy<T, D>::kLeast, logarithm = std::log(least);
          return run_with(slope_energy<T, D>(
              call, DeterminantEnergy<T, D>{static_cast<T>(logarithm * logarithm),
                                            static_cast<T>(2 * logarithm / least)}));
        }
      }
    });
  });
}

}  // namespace regkernels
