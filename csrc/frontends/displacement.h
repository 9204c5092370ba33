// Units of displacement fields.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace reg {

// What to multiply each component (x, y, z) of a displacement field by to turn its unit `source`
// into `target`: "normalised", "voxel" or "mm". `shape` is the field's own, (N, [Z,] Y, X, D) or,
// with `source_channels` "first", (N, D, [Z,] Y, X); `spacing` is in mm, x, y, z.
std::vector<double> displacement_factors(const std::vector<int64_t>& shape,
                                         const std::string& source, const std::string& target,
                                         const std::optional<std::vector<double>>& spacing,
                                         bool align_corners, const std::string& source_channels,
                                         const std::string& target_channels);

}  // namespace reg
