#include <algorithm>
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

// The elements of a call with their ranges, and the joint histogram of each.
template <class T>
struct CpuHistograms {
  HistogramOperands<T> operands;
  std::vector<Pair<T>> pairs;
  std::vector<double> counts;  // num_bins^2 for each element
  std::vector<double> totals;  // NaN where a sample was not a number

  explicit CpuHistograms(const Call& call) : operands(call) {
    operands.value_range = Operand<const T>(call.input("value_range"));
    find_ranges();
    count();
  }

  int64_t bins() const {
    return int64_t{1} * operands.checked.num_bins * operands.checked.num_bins;
  }

 private:
  void find_ranges() {
    const MutualInformationCall& checked = operands.checked;
    const int64_t samples = checked.samples;
    const Parts parts(samples, 1 << 15);
    const int64_t elements = checked.elements();
    const bool own = operands.value_range.data == nullptr;
    std::vector<T> extremes(elements * parts.count * kExtremes);
    pairs.reserve(elements);
    for (int64_t element = 0; element < elements; ++element) {
      const auto [group, item, channel] = operands.space().index(element);
      pairs.push_back({operands.pred.at(group, item, channel),
                       operands.target.at(group, item, channel),
                       operands.mask.present() ? operands.mask.at(group, item, channel) : nullptr,
                       {{0, 0}, {0, 0}, 1}});
    }
    parallel_for(elements * parts.count, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const Pair<T>& pair = pairs[task / parts.count];
        const int64_t begin = parts.begin(task % parts.count);
        const int64_t count = parts.end(task % parts.count, samples) - begin;
        constexpr T kInfinity = std::numeric_limits<T>::infinity();
        T found[kExtremes] = {kInfinity, -kInfinity, kInfinity, -kInfinity, 0};
        T least = 0;
        if (own) {
          find_extremes(pair.pred + begin, count, &found[kLowPred], &found[kHighPred]);
          find_extremes(pair.target + begin, count, &found[kLowTarget], &found[kHighTarget]);
        }
        if (pair.mask != nullptr) {
          find_extremes(pair.mask + begin, count, &least, &found[kHighMask]);
        }
        std::copy(found, found + kExtremes, extremes.data() + task * kExtremes);
      }
    });
    for (int64_t element = 0; element < elements; ++element) {
      T* const found = extremes.data() + element * parts.count * kExtremes;
      for (int64_t part = 1; part < parts.count; ++part) {
        const T* other = found + part * kExtremes;
        for (const int low : {kLowPred, kLowTarget}) found[low] = std::min(found[low], other[low]);
        for (const int high : {kHighPred, kHighTarget, kHighMask}) {
          found[high] = std::max(found[high], other[high]);
        }
      }
      const auto [group, item, channel] = operands.space().index(element);
      pairs[element].scale =
          PairScale<T>::from(own ? nullptr : operands.value_range.at(group, item),
                             operands.checked.joint_range, found, operands.mask.present());
    }
  }

  void count() {
    const MutualInformationCall& checked = operands.checked;
    const int64_t elements = checked.elements();
    // A part's own histogram has to be cleared and added up, which is little beside four samples
    // per bin. Many elements keep all threads busy without being cut.
    const Parts parts(checked.samples,
                      std::max<int64_t>({1 << 13, 4 * bins(), checked.samples * elements / 64}));
    const int reach = checked.reach;
    // Rows are read and written a few columns further than a window goes.
    const int64_t pitch = table_size(checked) + kOverhang;
    totals.assign(elements, 0);
    // First these are the counts of every part, in the end those of every element.
    counts.resize(elements * parts.count * bins());
    std::vector<char> bad(elements * parts.count);
    parallel_for(elements * parts.count, 1, [&](int64_t first, int64_t last) {
      std::vector<double> with_margin(pitch * (table_size(checked) + 1));
      for (int64_t task = first; task < last; ++task) {
        const int64_t part = task % parts.count;
        const int64_t begin = parts.begin(part), end = parts.end(part, checked.samples);
        const Pair<T>& pair = pairs[task / parts.count];
        std::fill(with_margin.begin(), with_margin.end(), 0);
        double* const histogram = with_margin.data();
        dispatch_window<T>(checked, [&](auto kernel, auto known_reach) {
          constexpr auto kKernel = static_cast<ParzenKernel>(decltype(kernel)::value);
          constexpr int kReach = decltype(known_reach)::value;
          bad[task] = with_vector_code([&] {
            return count_samples<kKernel, kReach>(operands.window, pair, begin, end, histogram,
                                                  pitch);
          });
        });
        const double* row = histogram + reach * pitch + reach;
        double* to = counts.data() + task * bins();
        for (int a = 0; a < checked.num_bins; ++a, row += pitch, to += checked.num_bins) {
          std::copy(row, row + checked.num_bins, to);
        }
      }
    });
    for (int64_t element = 0; element < elements; ++element) {
      double* const sum = counts.data() + element * bins();
      for (int64_t part = 0; part < parts.count; ++part) {
        const int64_t task = element * parts.count + part;
        const double* const from = counts.data() + task * bins();
        for (int64_t bin = 0; bin < bins(); ++bin) {
          sum[bin] = part == 0 ? from[bin] : sum[bin] + from[bin];
        }
        if (bad[task]) totals[element] = std::numeric_limits<double>::quiet_NaN();
      }
      for (int64_t bin = 0; bin < bins(); ++bin) totals[element] += sum[bin];
    }
    counts.resize(elements * bins());
  }
};

// The information of one element, normalised or not, and its derivatives with respect to p_ab.
struct Information {
  double value = 0;
  std::vector<double> by_p;  // empty: not wanted

  Information(const Call& call, const double* counts, double total, int num_bins,
              bool wants_derivatives) {
    const double scale = total == 0 ? 0 : 1 / total;
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
void save(const CpuHistograms<T>& histograms, int64_t element, const Information& information,
          const Tensor& table, const Tensor& scaling) {
  const MutualInformationCall& checked = histograms.operands.checked;
  const int64_t size = table_size(checked);
  T* const rows = table.as<T>() + element * size * size;
  std::fill(rows, rows + size * size, T(0));
  for (int a = 0; a < checked.num_bins; ++a) {
    T* const row = rows + (a + checked.reach) * size + checked.reach;
    for (int b = 0; b < checked.num_bins; ++b) {
      row[b] = static_cast<T>(-information.by_p[a * checked.num_bins + b]);
    }
  }
  const PairScale<T>& scale = histograms.pairs[element].scale;
  const double total = histograms.totals[element];
  const T values[kScalings] = {scale.pred.low,
                               scale.pred.high,
                               scale.target.low,
                               scale.target.high,
                               static_cast<T>(total == 0 ? 0 : 1 / total),
                               scale.largest_weight};
  std::copy(values, values + kScalings, scaling.as<T>() + element * kScalings);
}

template <class T>
void run_loss(const Call& call) {
  const CpuHistograms<T> histograms(call);
  const MutualInformationCall& checked = histograms.operands.checked;
  const auto reduction = call.choice<Reduction>("reduction");
  const Tensor& table = call.output("table");
  const int64_t elements = checked.elements();
  std::vector<double> losses(elements);
  parallel_for(elements, 1, [&](int64_t first, int64_t last) {
    for (int64_t element = first; element < last; ++element) {
      const Information information(call, histograms.counts.data() + element * histograms.bins(),
                                    histograms.totals[element], checked.num_bins, table.present);
      losses[element] = -information.value;
      if (table.present) save(histograms, element, information, table, call.output("scaling"));
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

template <class T>
void run_histogram(const Call& call) {
  const CpuHistograms<T> histograms(call);
  T* const output = call.output("output").as<T>();
  for (int64_t element = 0; element < histograms.operands.checked.elements(); ++element) {
    const double total = histograms.totals[element];
    const double scale = total == 0 ? 0 : 1 / total;
    for (int64_t bin = 0; bin < histograms.bins(); ++bin) {
      const int64_t i = element * histograms.bins() + bin;
      output[i] = static_cast<T>(histograms.counts[i] * scale);
    }
  }
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
            differentiate_samples<kKernel, kReach>(gradient.window, pair, begin, end, table.data(),
                                                   pitch, factor, to_pred, to_target);
          });
        });
      }
    }
  });
}

}  // namespace

void mutual_information_loss_cpu(const Context&, const Call& call) {
  dispatch_dtype(call.input("pred").dtype,
                 [&](auto type) { run_loss<typename decltype(type)::type>(call); });
}
void mutual_information_loss_grad_cpu(const Context& context, const Call& call) {
  dispatch_dtype(call.input("pred").dtype, [&](auto type) {
    run_gradient<typename decltype(type)::type>(Cpu(context), call);
  });
}
void joint_histogram_cpu(const Context&, const Call& call) {
  dispatch_dtype(call.input("pred").dtype,
                 [&](auto type) { run_histogram<typename decltype(type)::type>(call); });
}

}  // namespace regkernels
