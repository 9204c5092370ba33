#include "frontends/displacement.h"

#include <algorithm>
#include <cmath>

#include "core/errors.h"
#include "core/geometry.h"

namespace reg {

namespace {

[[noreturn]] void fail(const char* argument, const std::string& expected, const std::string& got) {
  throw ValueError(
      concat("convert_displacement: ", argument, ": expected ", expected, ", got ", got));
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

void check_unit(const char* argument, const std::string& unit) {
  if (unit != "normalised" && unit != "voxel" && unit != "mm") {
    fail(argument, "'normalised', 'voxel' or 'mm'", "'" + unit + "'");
  }
}

void check_channels(const char* argument, const std::string& channels) {
  if (channels != "first" && channels != "last") {
    fail(argument, "'first' or 'last'", "'" + channels + "'");
  }
}

}  // namespace

std::vector<double> displacement_factors(const std::vector<int64_t>& shape,
                                         const std::string& source, const std::string& target,
                                         const std::optional<std::vector<double>>& spacing,
                                         bool align_corners, const std::string& source_channels,
                                         const std::string& target_channels) {
  check_unit("source", source);
  check_unit("target", target);
  check_channels("source_channels", source_channels);
  check_channels("target_channels", target_channels);
  const size_t dimensions = shape.size() - 2;
  const bool last = source_channels == "last";
  const bool well_formed = (shape.size() == 4 || shape.size() == 5) &&
                           shape[last ? shape.size() - 1 : 1] == static_cast<int64_t>(dimensions);
  if (!well_formed) {
    fail("displacement",
         last ? "shape (N, Y, X, 2) or (N, Z, Y, X, 3)" : "shape (N, 2, Y, X) or (N, 3, Z, Y, X)",
         shape_text(shape));
  }
  const bool uses_mm = (source == "mm") != (target == "mm");
  if (uses_mm && !spacing) fail("spacing", "one number of mm per axis", "None");
  if (spacing) {
    if (spacing->size() != dimensions) {
      fail("spacing", concat(dimensions, " numbers, in x, y, z order"),
           concat(spacing->size(), " numbers"));
    }
    for (double value : *spacing) {
      if (!std::isfinite(value) || value <= 0) {
        fail("spacing", "finite numbers above 0", concat(value));
      }
    }
  }

  std::vector<double> factors;
  for (size_t k = 0; k < dimensions; ++k) {
    const int64_t size = shape[(last ? shape.size() - 2 : shape.size() - 1) - k];
    // Voxels per unit. An axis of one voxel has no extent with align_corners: the scale of two
    // voxels keeps the conversion invertible, and displacements along it have no effect anyway.
    const double half =
        half_extent(align_corners ? std::max<int64_t>(size, 2) : size, align_corners);
    auto voxels = [&](const std::string& unit) {
      if (unit == "normalised") return half;
      return unit == "mm" ? 1 / (*spacing)[k] : 1.0;
    };
    factors.push_back(source == target ? 1.0 : voxels(source) / voxels(target));
  }
  return factors;
}

}  // namespace reg
