#include <algorithm>
#include <type_traits>

#include "core/scratch.h"
#include "core/thread_pool.h"
#include "core/vector_code.h"
#include "ops/field_energy/field_energy.h"
#include "ops/field_energy/kernels.h"

namespace regkernels {

namespace {

// Sums are taken in so many strands side by side, whatever the CPU, so that the bits are the same.
constexpr int kStrands = 16;

template <class T>
double sum_in_strands(const T* values, int count) {
  T strands[kStrands] = {};
  const int whole = count / kStrands * kStrands;
  for (int e = 0; e < whole; e += kStrands) {
    for (int k = 0; k < kStrands; ++k) strands[k] += values[e + k];
  }
  double sum = 0;
  for (int k = 0; k < kStrands; ++k) sum += strands[k];
  for (int e = whole; e < count; ++e) sum += values[e];
  return sum;
}

// One row after the other, as one of numbers.
template <class Body>
class ComponentRows {
 public:
  using T = typename Body::T;

  ComponentRows(const Body& body, const VoxelSpace& space, Scratch& scratch)
      : body_(body),
        space_(space),
        energy_(scratch.take<T>(space.x)),
        unit_(scratch.take<T>(space.x)) {
    for (int e = 0; e < space.x; ++e) unit_[e] = body.squared_unit[e % D];
  }

  double sum(int64_t group, int64_t item, int z, int y) const {
    const auto row = body_.row(group, item, z, y);
    // Away from the borders there is nothing to ask for each voxel, and the loop is vector code.
    const bool inside = y >= kReach && y + kReach < space_.y &&
                        (D == 2 || (z >= kReach && z + kReach < body_.size[D - 1])) &&
                        space_.x >= 2 * kReach * D;
    const int first = inside ? kReach * D : space_.x;
    const int last = inside ? space_.x - kReach * D : space_.x;
    add_near_border(row, z, y, 0, first);
    add_near_border(row, z, y, last, space_.x);
    with_vector_code([&] {
      if (row.gradient != nullptr) {
        add_inside<true>(row, first, last);
      } else {
        add_inside<false>(row, first, last);
      }
    });
    return sum_in_strands(energy_, space_.x);
  }

 private:
  static constexpr int D = Body::kAxes;
  static constexpr int kReach = Body::kReach;
  using Row = typename Body::Row;

  void add_near_border(const Row& row, int z, int y, int first, int last) const {
    for (int e = first; e < last; ++e) {
      T energy = 0, pull = 0;
      // A product with 0 would let through a displacement that is not finite.
      if (unit_[e] != 0) {
        Body::EnergyOfComponent::add(body_.template component<false>(row, z, y, e), energy, pull);
      }
      energy_[e] = unit_[e] * energy;
      if (row.gradient != nullptr) row.gradient[e] = row.scale * unit_[e] * pull;
    }
  }

  template <bool kGradient>
  void add_inside(const Row& row, int first, int last) const {
    // The compiler knows that nobody changes what is local.
    const Body body = body_;
    const T *const unit = unit_, *const displacement = row.displacement;
    T *const all_energy = energy_, *const gradient = row.gradient;
    const T scale = row.scale;
#pragma GCC ivdep
    for (int e = first; e < last; ++e) {
      T energy = 0, pull = 0;
      const Component<T, D, true> around{
          displacement + e, body.stride, body.per_step, body.size, {}};
      Body::EnergyOfComponent::add(around, energy, pull);
      all_energy[e] = unit[e] * energy;
      if (kGradient) gradient[e] = scale * unit[e] * pull;
    }
  }

  const Body& body_;
  const VoxelSpace space_;
  T* energy_;
  T* unit_;  // what squares are multiplied by
};

// One voxel after the other.
template <class Body>
class SlopeRows {
 public:
  SlopeRows(const Body& body, const VoxelSpace& space, Scratch&) : body_(body), space_(space) {}

  double sum(int64_t group, int64_t item, int z, int y) const {
    return sum(group, item, z, y, 0, space_.x);
  }
  double sum(int64_t group, int64_t item, int z, int y, int first, int last) const {
    const auto element = body_.element(group, item);
    double total = 0;
    for (int x = first; x < last; ++x) total += element(Voxel{z, y, x, true, x, space_.x});
    return total;
  }

 private:
  const Body& body_;
  const VoxelSpace space_;
};

// Calls body(IntTag<k>) for k from 0 to kCount - 1. Loops would be unrolled too late for those
// around them to become vector code.
template <int kCount, class Body>
inline __attribute__((always_inline)) void for_each_axis(const Body& body) {
  if constexpr (kCount > 0) {
    for_each_axis<kCount - 1>(body);
    body(IntTag<kCount - 1>{});
  }
}

// The elastic energy of the voxels of a row together, where they are far from the border and the
// gradient is a formula.
// The loop is over numbers, whichever component they are of, as vector code has it: what is meant
// for one component is computed for all, and kept for that one.
template <class Body>
class ElasticRows {
 public:
  using T = typename Body::T;

  ElasticRows(const Body& body, const VoxelSpace& space, Scratch& scratch)
      : body_(body),
        space_(space),
        by_voxel_(body, space, scratch),
        energy_(scratch.take<T>(space.x * D)) {
    for (int j = 0; j < kBlock; ++j) {
      const int k = j % D;
      table_.is_first[j] = k == 0 ? T(1) : T(0);
      for (int a = 0; a < D; ++a) {
        table_.second[a][j] = body.kind.second[k][a];
        for (int c = 0; c < D; ++c) {
          table_.mixed[c][a][j] = c == k && a != k ? body.kind.mixed[k][a] : T(0);
        }
      }
    }
  }

  double sum(int64_t group, int64_t item, int z, int y) const {
    const int planes = body_.differences.frame.size[D - 1];
    const bool inside = y >= kReach && y + kReach < space_.y &&
                        (D == 2 || (z >= kReach && z + kReach < planes)) &&
                        (space_.x - 2 * kReach) * D >= kBlock;
    if (!inside) return by_voxel_.sum(group, item, z, y, 0, space_.x);
    const auto element = body_.element(group, item);
    const int64_t row = (static_cast<int64_t>(z) * space_.y + y) * space_.x * D;
    const T* const u = element.displacement + row;
    const int first = kReach * D, last = (space_.x - kReach) * D;
    with_vector_code([&] {
      if (element.gradient != nullptr) {
        add_inside<true>(u, element.gradient + row, element.scale, first, last);
      } else {
        add_inside<false>(u, static_cast<T*>(nullptr), element.scale, first, last);
      }
    });
    return by_voxel_.sum(group, item, z, y, 0, kReach) +
           sum_in_strands(energy_ + first, last - first) +
           by_voxel_.sum(group, item, z, y, space_.x - kReach, space_.x);
  }

 private:
  static constexpr int D = Body::kAxes;
  static constexpr int kReach = 2;
  static constexpr int kBlock = 16 * D;  // whole vectors of any set, and whole voxels

  struct Table {
    T is_first[kBlock];
    T second[D][kBlock];
    T mixed[D][D][kBlock];  // of component, and axis
  };

  // Blocks that overlap write the same twice.
  template <bool kGradient>
  void add_inside(const T* u, T* gradient, T scale, int first, int last) const {
    for (int begin = first; begin < last; begin += kBlock) {
      const int block = std::min(begin, last - kBlock);
      add_block<kGradient>(u + block, energy_ + block, kGradient ? gradient + block : nullptr,
                           scale);
    }
  }

  template <bool kGradient>
  void add_block(const T* u, T* energy, T* gradient, T scale) const {
    using Kind = typename Body::EnergyOfSlopes;
    // The compiler knows that nobody changes what is local.
    const Kind kind = body_.kind;
    const Frame<T, D> frame = body_.differences.frame;
    int64_t stride[D];
    for (int a = 0; a < D; ++a) stride[a] = body_.stride[a];
    const Table& table = table_;
#pragma GCC ivdep
    for (int j = 0; j < kBlock; ++j) {
      const T* const here = u + j;
      const auto slope = [&](auto k, auto a) {
        return T(0.5) * frame.half[k.value] *
               (here[k.value + stride[a.value]] - here[k.value - stride[a.value]]);
      };
      T squares = 0, trace = 0;
      for_each_axis<D>([&](auto k) {
        const T stretch = slope(k, k);
        squares += stretch * stretch;
        trace += stretch;
        for_each_axis<k.value>([&](auto a) {
          const T shear = kind.ratio[k.value][a.value] * slope(k, a) +
                          kind.ratio[a.value][k.value] * slope(a, k);
          squares += T(0.5) * shear * shear;
        });
      });
      const T own = kind.mu * squares + T(0.5) * kind.lam * trace * trace;
      energy[j] = table.is_first[j] != 0 ? own : T(0);
    }
    if (!kGradient) return;
#pragma GCC ivdep
    for (int j = 0; j < kBlock; ++j) {
      const T* const here = u + j;
      T sum = 0;
      for_each_axis<D>([&](auto a) {
        const int64_t two = 2 * stride[a.value];
        sum += table.second[a.value][j] * ((here[0] - here[-two]) + (here[0] - here[two]));
      });
      for_each_axis<D>([&](auto k) {
        for_each_axis<D>([&](auto a) {
          if constexpr (k.value != a.value) {
            const T weight = table.mixed[k.value][a.value][j];
            const T twist = Kind::twist(here - k.value, a.value, stride[k.value], stride[a.value]);
            sum += weight != 0 ? weight * twist : T(0);
          }
        });
      });
      gradient[j] = scale * sum;
    }
  }

  const Body& body_;
  const VoxelSpace space_;
  const SlopeRows<Body> by_voxel_;
  T* energy_;
  Table table_;
};

template <class Body, class = void>
struct RowsOf {
  static constexpr bool kElastic =
      std::is_same_v<typename Body::EnergyOfSlopes, ElasticEnergy<typename Body::T, Body::kAxes>>;
  using type = std::conditional_t<kElastic, ElasticRows<Body>, SlopeRows<Body>>;
};
template <class Body>
struct RowsOf<Body, std::void_t<typename Body::EnergyOfComponent>> {
  using type = ComponentRows<Body>;
};

// Leaves the sum of each part of each item in `partial`, unless that is null, and the gradient.
template <class Body>
void sum_parts(Body body, const VoxelSpace& space, const OwnPlanes& own, int64_t parts,
               typename Body::T* partial) {
  const int64_t rows = space.rows();
  const int first = own.first();
  const int64_t before = first * body.stride[Body::kAxes - 1];  // numbers of earlier planes
  body.displacement.data -= before;
  if (body.gradient.data != nullptr) body.gradient.data -= before;
  parallel_for(space.batch() * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const typename RowsOf<Body>::type each(body, space, scratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts, part = i % parts;
      double total = 0;
      for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) {
        const int z = first + static_cast<int>(row / space.y);
        if (z >= own.in_volume) break;
        total += each.sum(b / space.items, b % space.items, z, static_cast<int>(row % space.y));
      }
      if (partial != nullptr) partial[i] = static_cast<typename Body::T>(total);
    }
  });
}

}  // namespace

void field_energy_cpu(const Context&, const Call& call) {
  const auto& checked = call.checked<FieldEnergyCall>();
  with_field_energy(call, [&](const auto& body, const VoxelSpace& space) {
    using T = typename std::decay_t<decltype(body)>::T;
    T* const partial = call.output("partial_sums").template as<T>();
    T* const output = call.output("output").template as<T>();
    sum_parts(body, space, OwnPlanes(call), checked.parts, partial);
    const int64_t totals = checked.output.count();
    const int64_t terms = checked.output.rank() == 1 ? space.items * checked.parts : checked.parts;
    for (int64_t i = 0; i < totals; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < terms; ++k) sum += partial[i * terms + k];
      output[i] = static_cast<T>(checked.scale() * sum);
    }
  });
}

void field_energy_grad_cpu(const Context&, const Call& call) {
  with_field_energy(call, [&](const auto& body, const VoxelSpace& space) {
    using T = typename std::decay_t<decltype(body)>::T;
    sum_parts(body, space, OwnPlanes(call), call.checked<FieldEnergyCall>().parts,
              static_cast<T*>(nullptr));
  });
}

}  // namespace regkernels
