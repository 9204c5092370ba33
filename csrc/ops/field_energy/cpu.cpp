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
                        (D == 2 || (z >= kReach && z + kReach < space_.z)) &&
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

template <class Body>
class SlopeRows {
 public:
  SlopeRows(const Body& body, const VoxelSpace& space, Scratch&) : body_(body), space_(space) {}

  double sum(int64_t group, int64_t item, int z, int y) const {
    const auto element = body_.element(group, item);
    double total = 0;
    for (int x = 0; x < space_.x; ++x) total += element(Voxel{z, y, x, true, x, space_.x});
    return total;
  }

 private:
  const Body& body_;
  const VoxelSpace space_;
};

template <class Body, class = void>
struct RowsOf {
  using type = SlopeRows<Body>;
};
template <class Body>
struct RowsOf<Body, std::void_t<typename Body::EnergyOfComponent>> {
  using type = ComponentRows<Body>;
};

// Leaves the sum of each part of each item in `partial`, unless that is null, and the gradient.
template <class Body>
void sum_parts(const Body& body, const VoxelSpace& space, int64_t parts,
               typename Body::T* partial) {
  const int64_t rows = space.rows();
  parallel_for(space.batch() * parts, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    const typename RowsOf<Body>::type each(body, space, scratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts, part = i % parts;
      double total = 0;
      for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) {
        total += each.sum(b / space.items, b % space.items, static_cast<int>(row / space.y),
                          static_cast<int>(row % space.y));
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
    sum_parts(body, space, checked.parts, partial);
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
    sum_parts(body, space, call.checked<FieldEnergyCall>().parts, static_cast<T*>(nullptr));
  });
}

}  // namespace regkernels
