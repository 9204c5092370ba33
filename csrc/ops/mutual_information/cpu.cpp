#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/for_each.h"
#include "core/reduce.h"
#include "core/vector_code.h"
#include "ops/losses/finish.h"
#include "ops/mutual_information/call.h"
#include "ops/mutual_information/mutual_information.h"

namespace regkernels {

namespace {

// Weights are computed for this many samples at a time, by vector code.
constexpr int kBlock = 64;
// Rows of a histogram or a table are taken by whole vectors, which may be this much wider than the
// widest window.
constexpr int kOverhang = 40;

// The images of one element and how their values are read.
template <class T>
struct Pair {
  const T* pred;
  const T* target;
  const T* mask;  // null: all ones
  PairScale<T> scale;
};

// How the samples of all elements are cut into parts that threads take. It depends on their number
// alone.
struct Parts {
  int64_t count, size;

  Parts(int64_t samples, int64_t least) {
    size = std::max<int64_t>({1, least, (samples + 63) / 64});
    count = (samples + size - 1) / size;
  }
  int64_t begin(int64_t part) const { return part * size; }
  int64_t end(int64_t part, int64_t samples) const { return std::min(samples, (part + 1) * size); }
};

template <class T>
void find_extremes(const T* values, int64_t count, T* low, T* high) {
  for (int64_t i = 0; i < count; ++i) {
    const T value = values[i];
    const bool finite = value - value == 0;
    *low = finite && value < *low ? value : *low;
    *high = finite && value > *high ? value : *high;
  }
}

// The weights of a block of samples on the bins of one image and, with kSlopes, their derivatives.
// They are computed one tap after the other for all samples together, and kept one sample after the
// other, with zeros up to a whole number of vectors.
template <ParzenKernel kKernel, int kReach, bool kSlopes, class T, class Kept>
struct BlockWeights {
  static constexpr int kTaps = 2 * kReach + 1;
  static constexpr int kWidth = (kTaps + 7) / 8 * 8;
  int middle[kBlock];
  Kept weight[kBlock][kWidth] = {};
  Kept slope[kSlopes ? kBlock : 1][kWidth] = {};

  void compute(const Parzen<T>& window, const T* t) {
    T taps[kTaps][kBlock];
    T tap_slopes[kTaps][kBlock];
#pragma GCC ivdep
    for (int s = 0; s < kBlock; ++s) {
      ParzenWeights<T, kReach> one;
      parzen_weights<kKernel, kSlopes>(window, t[s], one);
      middle[s] = one.middle;
      REGKERNELS_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        taps[j][s] = one.weight[j];
        if constexpr (kSlopes) tap_slopes[j][s] = one.slope[j];
      }
    }
    for (int j = 0; j < kTaps; ++j) {
      for (int s = 0; s < kBlock; ++s) weight[s][j] = taps[j][s];
      if constexpr (!kSlopes) continue;
      for (int s = 0; s < kBlock; ++s) slope[s][j] = tap_slopes[j][s];
    }
  }
};

// Copies a block of values, and repeats the first where there are too few.
template <class T>
void load_block(const T* values, int count, T* block) {
  std::copy(values, values + count, block);
  std::fill(block + count, block + kBlock, values[0]);
}

// Reads a block of samples: where they are in bins, and what they weigh. A sample that is not a
// number is put at 0 and weighs nothing. Returns whether there is one whose weight is not 0.
template <class T>
bool read_block(const Pair<T>& pair, int num_bins, int64_t begin, int64_t end, T* pred, T* target,
                T* weight) {
  const int count = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
  load_block(pair.pred + begin, count, pred);
  load_block(pair.target + begin, count, target);
  if (pair.mask == nullptr) {
    std::fill(weight, weight + kBlock, T(1));
  } else {
    load_block(pair.mask + begin, count, weight);
    for (int s = 0; s < kBlock; ++s) weight[s] = pair.scale.weight(weight[s]);
  }
  std::fill(weight + count, weight + kBlock, T(0));
  const PairScale<T> scale = pair.scale;
  int bad = 0;
  for (int s = 0; s < kBlock; ++s) {
    const T at_pred = scale.pred.position(pred[s], num_bins);
    const T at_target = scale.target.position(target[s], num_bins);
    const T sum = at_pred + at_target + weight[s];
    const bool broken = !(sum - sum == 0);
    bad |= static_cast<int>(broken) & static_cast<int>(weight[s] != 0);
    weight[s] = broken ? T(0) : weight[s];
    pred[s] = broken ? T(0) : at_pred;
    target[s] = broken ? T(0) : at_target;
  }
  return bad != 0;
}

// Adds a run of samples to a histogram, which has a margin for what reaches over its ends. Returns
// whether one of them is not a number.
template <ParzenKernel kKernel, int kReach, class T>
bool count_samples(const Parzen<T>& window, const Pair<T>& pair, int64_t begin, int64_t end,
                   double* histogram, int64_t pitch) {
  using Weights = BlockWeights<kKernel, kReach, false, T, double>;
  T at_pred[kBlock], at_target[kBlock], weight[kBlock];
  Weights pred, target;
  bool bad = false;
  for (; begin < end; begin += kBlock) {
    bad |= read_block(pair, window.num_bins, begin, end, at_pred, at_target, weight);
    pred.compute(window, at_pred);
    target.compute(window, at_target);
    for (int s = 0; s < kBlock; ++s) {
      if (weight[s] == 0) continue;
      double* row = histogram + pred.middle[s] * pitch + target.middle[s];
      for (int j = 0; j < Weights::kTaps; ++j, row += pitch) {
        const double a = pred.weight[s][j] * weight[s];
#pragma GCC ivdep
        for (int i = 0; i < Weights::kWidth; ++i) row[i] += a * target.weight[s][i];
      }
    }
  }
  return bad;
}

// Where the gradients of samples go. Each is written, or added to what is there.
template <class T>
struct GradientTarget {
  T* data;  // null: not wanted
  bool add;

  void store(int64_t i, T value) const { data[i] = add ? data[i] + value : value; }
};

// Σ_ab table_ab rows_a columns_b over the bins of a window.
template <int kTaps, int kWidth, class T>
T contract(const T* table, int64_t pitch, const T* rows, const T* columns) {
  T sums[kWidth] = {};
  for (int a = 0; a < kTaps; ++a, table += pitch) {
#pragma GCC ivdep
    for (int b = 0; b < kWidth; ++b) sums[b] += rows[a] * table[b];
  }
  T total = 0;
  for (int b = 0; b < kWidth; b += 8) {
    T product[8];
    for (int k = 0; k < 8; ++k) product[k] = sums[b + k] * columns[b + k];
    for (int half = 4; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) product[k] += product[k + half];
    }
    total += product[0];
  }
  return total;
}

template <ParzenKernel kKernel, int kReach, class T>
void differentiate_samples(const Parzen<T>& window, const Pair<T>& pair, int64_t begin, int64_t end,
                           const T* table, int64_t pitch, T factor,
                           const GradientTarget<T>& grad_pred,
                           const GradientTarget<T>& grad_target) {
  using Weights = BlockWeights<kKernel, kReach, true, T, T>;
  constexpr int kTaps = Weights::kTaps, kWidth = Weights::kWidth;
  T at_pred[kBlock], at_target[kBlock], weight[kBlock];
  Weights pred, target;
  for (; begin < end; begin += kBlock) {
    read_block(pair, window.num_bins, begin, end, at_pred, at_target, weight);
    pred.compute(window, at_pred);
    target.compute(window, at_target);
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
    for (int s = 0; s < count; ++s) {
      const T* const corner = table + pred.middle[s] * pitch + target.middle[s];
      const int64_t i = begin + s;
      const T w = factor * weight[s];
      if (grad_pred.data != nullptr) {
        const T by_pred = contract<kTaps, kWidth>(corner, pitch, pred.slope[s], target.weight[s]);
        grad_pred.store(i, w * by_pred * pair.scale.pred.slope(pair.pred[i], window.num_bins));
      }
      if (grad_target.data != nullptr) {
        const T by_target = contract<kTaps, kWidth>(corner, pitch, pred.weight[s], target.slope[s]);
        grad_target.store(i,
                          w * by_target * pair.scale.target.slope(pair.target[i], window.num_bins));
      }
    }
  }
}

// The images of all elements; how their values are read is not known yet.
template <class T>
std::vector<Pair<T>> pairs_of(const HistogramOperands<T>& operands) {
  std::vector<Pair<T>> pairs;
  const int64_t elements = operands.checked.elements();
  pairs.reserve(elements);
  for (int64_t element = 0; element < elements; ++element) {
    const auto [group, item, channel] = operands.space().index(element);
    pairs.push_back({operands.pred.at(group, item, channel),
                     operands.target.at(group, item, channel),
                     operands.mask.present() ? operands.mask.at(group, item, channel) : nullptr,
                     {{0, 0}, {0, 0}, 1}});
  }
  return pairs;
}

// Finds the extremes of all elements, (elements, kExtremes).
template <class T>
void find_extremes(const HistogramOperands<T>& operands, bool own_range, T* result) {
  const MutualInformationCall& checked = operands.checked;
  const std::vector<Pair<T>> pairs = pairs_of(operands);
  const Parts parts(checked.samples, 1 << 15);
  const int64_t elements = checked.elements();
  std::vector<T> extremes(elements * parts.count * kExtremes);
  parallel_for(elements * parts.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t element = task / parts.count;
      const Pair<T>& pair = pairs[element];
      const int64_t begin = parts.begin(task % parts.count);
      const int64_t own = operands.own.of(operands.space().index(element).group);
      const int64_t count = parts.end(task % parts.count, own) - begin;
      constexpr T kInfinity = std::numeric_limits<T>::infinity();
      T low_pred = kInfinity, low_target = kInfinity, least = 0;
      T* const found = extremes.data() + task * kExtremes;
      found[kHighPred] = found[kHighTarget] = -kInfinity;
      found[kHighMask] = pair.mask == nullptr ? T(1) : T(0);
      if (own_range) {
        find_extremes(pair.pred + begin, count, &low_pred, &found[kHighPred]);
        find_extremes(pair.target + begin, count, &low_target, &found[kHighTarget]);
      }
      if (pair.mask != nullptr) {
        find_extremes(pair.mask + begin, count, &least, &found[kHighMask]);
      }
      found[kMinusLowPred] = -low_pred;
      found[kMinusLowTarget] = -low_target;
    }
  });
  for (int64_t element = 0; element < elements; ++element) {
    const T* const found = extremes.data() + element * parts.count * kExtremes;
    T* const combined = result + element * kExtremes;
    std::copy(found, found + kExtremes, combined);
    for (int64_t i = kExtremes; i < parts.count * kExtremes; ++i) {
      combined[i % kExtremes] = std::max(combined[i % kExtremes], found[i]);
    }
  }
}

// How the values of all elements are read, by the extremes in the tensor, of one part, if needed.
template <class T>
std::vector<PairScale<T>> read_scales(const Call& call, const Tensor& extremes) {
  const auto& checked = call.checked<MutualInformationCall>();
  const ScaleOperands<T> operands(call, checked, extremes);
  std::vector<PairScale<T>> scales;
  scales.reserve(checked.elements());
  for (int64_t element = 0; element < checked.elements(); ++element) {
    const ElementIndex index = operands.space.index(element);
    scales.push_back(operands.scale(index, operands.extremes_of(index)));
  }
  return scales;
}

// The joint histograms of all elements, not yet divided by their sums.
struct CpuCounts {
  int64_t bins;
  std::vector<double> counts;  // num_bins^2 for each element
  std::vector<double> totals;  // NaN where a sample was not a number

  CpuCounts(const MutualInformationCall& checked, int64_t parts)
      : bins(checked.bins()),
        counts(checked.elements() * parts * bins),
        totals(checked.elements(), 0) {}
  const double* of(int64_t element) const { return counts.data() + element * bins; }
  double share(int64_t element) const { return totals[element] == 0 ? 0 : 1 / totals[element]; }
};

// Counts the samples of all elements.
template <class T>
CpuCounts count_samples(const Call& call, const HistogramOperands<T>& operands,
                        const std::vector<PairScale<T>>& scales) {
  const MutualInformationCall& checked = operands.checked;
  const Parzen<T> window = parzen_window<T>(call, checked);
  const int64_t elements = checked.elements(), bins = checked.bins();
  std::vector<Pair<T>> pairs = pairs_of(operands);
  for (int64_t element = 0; element < elements; ++element) pairs[element].scale = scales[element];
  // A part's own histogram has to be cleared and added up, which is little beside four samples
  // per bin. Many elements keep all threads busy without being cut.
  const Parts parts(checked.samples,
                    std::max<int64_t>({1 << 13, 4 * bins, checked.samples * elements / 64}));
  const int reach = checked.reach;
  // Rows are read and written a few columns further than a window goes.
  const int64_t pitch = table_size(checked) + kOverhang;
  // First these are the counts of every part, in the end those of every element.
  CpuCounts result(checked, parts.count);
  std::vector<double>&counts = result.counts, &totals = result.totals;
  std::vector<char> bad(elements * parts.count);
  parallel_for(elements * parts.count, 1, [&](int64_t first, int64_t last) {
    std::vector<double> with_margin(pitch * (table_size(checked) + 1));
    for (int64_t task = first; task < last; ++task) {
      const int64_t element = task / parts.count, part = task % parts.count;
      const int64_t own = operands.own.of(operands.space().index(element).group);
      const int64_t begin = parts.begin(part), end = parts.end(part, own);
      const Pair<T>& pair = pairs[element];
      std::fill(with_margin.begin(), with_margin.end(), 0);
      double* const histogram = with_margin.data();
      dispatch_window<T>(checked, [&](auto kernel, auto known_reach) {
        constexpr auto kKernel = static_cast<ParzenKernel>(decltype(kernel)::value);
        constexpr int kReach = decltype(known_reach)::value;
        bad[task] = with_vector_code([&] {
          return count_samples<kKernel, kReach>(window, pair, begin, end, histogram, pitch);
        });
      });
      const double* row = histogram + reach * pitch + reach;
      double* to = counts.data() + task * bins;
      for (int a = 0; a < checked.num_bins; ++a, row += pitch, to += checked.num_bins) {
        std::copy(row, row + checked.num_bins, to);
      }
    }
  });
  for (int64_t element = 0; element < elements; ++element) {
    double* const sum = counts.data() + element * bins;
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t task = element * parts.count + part;
      const double* const from = counts.data() + task * bins;
      for (int64_t bin = 0; bin < bins; ++bin) {
        sum[bin] = part == 0 ? from[bin] : sum[bin] + from[bin];
      }
      if (bad[task]) totals[element] = std::numeric_limits<double>::quiet_NaN();
    }
    for (int64_t bin = 0; bin < bins; ++bin) totals[element] += sum[bin];
  }
  counts.resize(elements * bins);
  return result;
}

// Writes counts as integers, which devices add up without rounding.
void store_counts(const MutualInformationCall& checked, const CpuCounts& counts, int64_t* to) {
  const double units = checked.count_units();
  for (int64_t element = 0; element < checked.elements(); ++element) {
    const double* const from = counts.of(element);
    for (int64_t bin = 0; bin < counts.bins; ++bin) *to++ = std::llrint(from[bin] * units);
    *to++ = std::isnan(counts.totals[element]) ? 1 : 0;
  }
}

// Reads them again; groups and items may share them.
CpuCounts load_counts(const MutualInformationCall& checked, const Tensor& counts) {
  const ElementSpace space{checked.batch.items, checked.channels};
  const Operand<const int64_t> operand(counts);
  const double sample = 1 / checked.count_units();
  CpuCounts result(checked, 1);
  for (int64_t element = 0; element < checked.elements(); ++element) {
    const auto [group, item, channel] = space.index(element);
    const int64_t* const from = operand.at(group, item) + channel * (result.bins + 1);
    int64_t sum = 0;
    for (int64_t bin = 0; bin < result.bins; ++bin) {
      sum += from[bin];
      result.counts[element * result.bins + bin] = static_cast<double>(from[bin]) * sample;
    }
    result.totals[element] = from[result.bins] == 0 ? static_cast<double>(sum) * sample
                                                    : std::numeric_limits<double>::quiet_NaN();
  }
  return result;
}

// The information of one element, normalised or not, and its derivatives with respect to p_ab.
struct Information {
  double value = 0;
  std::vector<double> by_p;  // empty: not wanted

  // `scale`: 1 / (sum of the counts).
  Information(const Call& call, const double* counts, double scale, int num_bins,
              bool wants_derivatives) {
    std::vector<double> p_a(num_bins), p_b(num_bins);
    for (int a = 0; a < num_bins; ++a) {
      for (int b = 0; b < num_bins; ++b) {
        p_a[a] += counts[a * num_bins + b] * scale;
        p_b[b] += counts[a * num_bins + b] * scale;
      }
    }
    if (wants_derivatives) by_p.resize(int64_t{1} * num_bins * num_bins);
    if (call.flag("normalised")) {
      normalise(counts, scale, p_a, p_b);
    } else {
      sum_terms(call, counts, scale, p_a, p_b);
    }
  }

 private:
  void normalise(const double* counts, double scale, const std::vector<double>& p_a,
                 const std::vector<double>& p_b) {
    const auto num_bins = static_cast<int>(p_a.size());
    double separate = 0, joint = 0;
    for (int a = 0; a < num_bins; ++a) separate += entropy_term(p_a[a]) + entropy_term(p_b[a]);
    for (int i = 0; i < num_bins * num_bins; ++i) joint += entropy_term(counts[i] * scale);
    const NormalisedInformation information(separate, joint);
    value = information.value();
    if (by_p.empty()) return;
    for (int a = 0; a < num_bins; ++a) {
      for (int b = 0; b < num_bins; ++b) {
        const int i = a * num_bins + b;
        by_p[i] = information.slope(counts[i] * scale, p_a[a], p_b[b]);
      }
    }
  }

  void sum_terms(const Call& call, const double* counts, double scale,
                 const std::vector<double>& p_a, const std::vector<double>& p_b) {
    const auto num_bins = static_cast<int>(p_a.size());
    const double smooth_nr = call.number("smooth_nr"), smooth_dr = call.number("smooth_dr");
    std::vector<double> by_p_a(num_bins), by_p_b(num_bins);
    for (int a = 0; a < num_bins; ++a) {
      for (int b = 0; b < num_bins; ++b) {
        const int i = a * num_bins + b;
        const InformationTerm term =
            information_term(counts[i] * scale, p_a[a] * p_b[b], smooth_nr, smooth_dr);
        value += term.value;
        if (by_p.empty()) continue;
        by_p[i] = term.by_p;
        by_p_a[a] += term.by_q * p_b[b];
        by_p_b[b] += term.by_q * p_a[a];
      }
    }
    if (by_p.empty()) return;
    for (int a = 0; a < num_bins; ++a) {
      for (int b = 0; b < num_bins; ++b) by_p[a * num_bins + b] += by_p_a[a] + by_p_b[b] + 1;
    }
  }
};

template <class T>
void save_table(const MutualInformationCall& checked, const Information& information, T* rows) {
  const int64_t size = table_size(checked);
  std::fill(rows, rows + size * size, T(0));
  for (int a = 0; a < checked.num_bins; ++a) {
    T* const row = rows + (a + checked.reach) * size + checked.reach;
    for (int b = 0; b < checked.num_bins; ++b) {
      row[b] = static_cast<T>(-information.by_p[a * checked.num_bins + b]);
    }
  }
}

template <class T>
void save_scaling(const PairScale<T>& scale, double inverse_total, T* scaling) {
  const T values[kScalings] = {scale.pred.low,
                               scale.pred.high,
                               scale.target.low,
                               scale.target.high,
                               static_cast<T>(inverse_total),
                               scale.largest_weight};
  std::copy(values, values + kScalings, scaling);
}

// From the counts to the loss and what is saved for its gradient.
template <class T>
void inform(const Call& call, const std::vector<PairScale<T>>& scales, const CpuCounts& counts) {
  const auto& checked = call.checked<MutualInformationCall>();
  const auto reduction = call.choice<Reduction>("reduction");
  const Tensor& table = call.output("table");
  const Tensor& scaling = call.output("scaling");
  const int64_t elements = checked.elements();
  const int64_t table_count = table_size(checked) * table_size(checked);
  std::vector<double> losses(elements);
  parallel_for(elements, 1, [&](int64_t first, int64_t last) {
    for (int64_t element = first; element < last; ++element) {
      const Information information(call, counts.of(element), counts.share(element),
                                    checked.num_bins, table.present);
      losses[element] = -information.value;
      if (table.present) save_table(checked, information, table.as<T>() + element * table_count);
      if (scaling.present) {
        save_scaling(scales[element], counts.share(element), scaling.as<T>() + element * kScalings);
      }
    }
  });
  T* const output = call.output("output").as<T>();
  if (reduction == Reduction::kNone) {
    for (int64_t element = 0; element < elements; ++element) {
      output[element] = static_cast<T>(losses[element]);
    }
    return;
  }
  const bool mean = reduction == Reduction::kMean;
  const int64_t per_group = checked.batch.items * checked.channels;
  for (int64_t group = 0; group < checked.batch.groups; ++group) {
    double sum = 0;
    for (int64_t i = 0; i < per_group; ++i) sum += losses[group * per_group + i];
    if (mean && per_group > 0) sum /= static_cast<double>(per_group);
    output[group] = static_cast<T>(sum);
  }
}

// From the counts to the shares of the bins.
template <class T>
void share_out(const Call& call, const CpuCounts& counts, T* histogram) {
  for (int64_t element = 0; element < call.checked<MutualInformationCall>().elements(); ++element) {
    const double* const those = counts.of(element);
    const double share = counts.share(element);
    for (int64_t bin = 0; bin < counts.bins; ++bin) {
      *histogram++ = static_cast<T>(those[bin] * share);
    }
  }
}

// How the values of all elements are read, for a loss or a histogram.
template <class T>
std::vector<PairScale<T>> find_scales(const Call& call, const HistogramOperands<T>& operands) {
  const MutualInformationCall& checked = operands.checked;
  std::vector<T> found(checked.elements() * kExtremes);
  Tensor extremes;
  if (call.output("extremes").present) {
    find_extremes(operands, !call.input("value_range").present, found.data());
    extremes = tensor_spec(
        checked.dtype, {checked.batch.groups, checked.batch.items, checked.channels, kExtremes});
    extremes.data = found.data();
  }
  return read_scales<T>(call, extremes);
}

template <class T>
void run_loss(const Call& call) {
  const HistogramOperands<T> operands(call);
  const std::vector<PairScale<T>> scales = find_scales(call, operands);
  inform(call, scales, count_samples(call, operands, scales));
}

template <class T>
void run_histogram(const Call& call) {
  const HistogramOperands<T> operands(call);
  const CpuCounts counts = count_samples(call, operands, find_scales(call, operands));
  share_out(call, counts, call.output("output").as<T>());
}

template <class T>
void run_extremes(const Call& call) {
  const bool own_range = !call.input("value_range").present;
  find_extremes(HistogramOperands<T>(call), own_range, call.output("output").as<T>());
}

template <class T>
void run_counts(const Call& call) {
  const HistogramOperands<T> operands(call);
  const std::vector<PairScale<T>> scales = read_scales<T>(call, call.input("extremes"));
  store_counts(operands.checked, count_samples(call, operands, scales),
               call.output("output").as<int64_t>());
}

template <class T>
void run_of_counts(const Call& call) {
  const auto& checked = call.checked<MutualInformationCall>();
  const CpuCounts counts = load_counts(checked, call.input("counts"));
  inform(call, read_scales<T>(call, call.input("extremes")), counts);
  const Tensor& histogram = call.output("histogram");
  if (histogram.present) share_out(call, counts, histogram.as<T>());
}

template <class T>
void run_gradient(const Cpu& device, const Call& call) {
  const HistogramOperands<T> histogram(call);
  const MutualInformationCall& checked = histogram.checked;
  if (checked.elements() * checked.samples == 0) return clear_gradients(device, call);
  const GradientOperands<T> gradient(call, histogram);
  const int64_t items_here = gradient.items_together() ? gradient.space.items : 1;
  const ElementSpace outer{gradient.space.items / items_here, gradient.space.channels};
  const Parts parts(checked.samples, 1 << 14);
  parallel_for(checked.elements() / items_here * parts.count, 1, [&](int64_t first, int64_t last) {
    // Rows of the table are read a few columns further than a window goes.
    const int64_t size = table_size(checked), pitch = size + kOverhang;
    std::vector<T> table((size + 1) * pitch);
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = parts.begin(task % parts.count);
      const int64_t end = parts.end(task % parts.count, checked.samples);
      ElementIndex index = outer.index(task / parts.count);
      const int64_t own_end = std::max(begin, std::min(end, gradient.own.of(index.group)));
      for (int64_t n = 0; n < items_here; ++n) {
        index.item = items_here > 1 ? n : index.item;
        const auto [group, item, channel] = index;
        const Pair<T> pair{
            gradient.pred.at(group, item, channel), gradient.target.at(group, item, channel),
            gradient.mask.present() ? gradient.mask.at(group, item, channel) : nullptr,
            gradient.scale(index)};
        const T* const rows = gradient.table_of(index);
        for (int64_t row = 0; row < size; ++row) {
          std::copy(rows + row * size, rows + (row + 1) * size, table.data() + row * pitch);
        }
        const auto to = [&, g = group, i = item, c = channel](const Channels<T>& target,
                                                              bool shared) {
          return GradientTarget<T>{target.present() ? target.at(g, i, c) : nullptr,
                                   shared && n > 0};
        };
        dispatch_smooth_window<T>(checked, [&](auto kernel, auto reach) {
          constexpr auto kKernel = static_cast<ParzenKernel>(decltype(kernel)::value);
          constexpr int kReach = decltype(reach)::value;
          const T factor = gradient.factor(index);
          const auto to_pred = to(gradient.grad_pred, gradient.sum_pred);
          const auto to_target = to(gradient.grad_target, gradient.sum_target);
          with_vector_code([&] {
            differentiate_samples<kKernel, kReach>(gradient.window, pair, begin, own_end,
                                                   table.data(), pitch, factor, to_pred, to_target);
          });
          for (const auto& padded : {to_pred, to_target}) {
            if (padded.data == nullptr || padded.add) continue;
            std::fill(padded.data + own_end, padded.data + end, T(0));
          }
        });
      }
    }
  });
}

}  // namespace

void mutual_information_loss_cpu(const Context&, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype,
                 [&](auto type) { run_loss<typename decltype(type)::type>(call); });
}
void mutual_information_loss_grad_cpu(const Context& context, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype, [&](auto type) {
    run_gradient<typename decltype(type)::type>(Cpu(context), call);
  });
}
void joint_histogram_cpu(const Context&, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype,
                 [&](auto type) { run_histogram<typename decltype(type)::type>(call); });
}
void value_extremes_cpu(const Context&, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype,
                 [&](auto type) { run_extremes<typename decltype(type)::type>(call); });
}
void joint_counts_cpu(const Context&, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype,
                 [&](auto type) { run_counts<typename decltype(type)::type>(call); });
}
void mutual_information_of_counts_cpu(const Context&, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype,
                 [&](auto type) { run_of_counts<typename decltype(type)::type>(call); });
}

}  // namespace regkernels
