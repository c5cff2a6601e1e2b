// The bits of an IEEE number without its sign bit order like its absolute value, so the smallest
// ones are found by counting bit patterns, 16 bits at a time. tierd_tools.prune is the specification.
#include "encode_prune.h"

#include <algorithm>
#include <memory>

namespace tierd {
namespace encode {
namespace {

constexpr uint32_t kDigits = 1u << 16;
constexpr uint32_t kTables = 2;   // equal neighbours, as zeros often are, then wait half as often
constexpr uint64_t kBlock = 512;  // elements that are counted before they are cut: stay in L1

template <typename Element>
constexpr Element kMagnitude = static_cast<Element>(~Element{0}) >> 1;

// Counts of one 16-bit digit of the magnitudes.
class Counts {
 public:
  Counts() : counts_(new uint64_t[kTables * kDigits]()) {}

  void clear() { std::fill(counts_.get(), counts_.get() + kTables * kDigits, 0); }
  void add(uint32_t table, uint32_t digit) { ++counts_[table * kDigits + digit]; }
  void merge() {
    for (uint32_t digit = 0; digit < kDigits; ++digit) {
      counts_[digit] += counts_[kDigits + digit];
    }
  }
  uint64_t& operator[](uint32_t digit) { return counts_[digit]; }

 private:
  std::unique_ptr<uint64_t[]> counts_;
};

// Prune what is smaller than `magnitude`, and the first `ties` elements that equal it.
struct Threshold {
  uint32_t magnitude;
  uint64_t ties;
};

template <typename Element>
Threshold find_threshold(const Element* first, int64_t stride, uint64_t rows, uint64_t cols,
                         uint32_t infinity, uint64_t zeros, uint64_t wanted) {
  constexpr uint32_t kWidth = 8 * sizeof(Element);
  Counts counts;
  Threshold found{0, wanted};
  for (uint32_t shift = kWidth - 16;; shift -= 16) {
    const bool leading = shift + 16 == kWidth;
    const uint32_t above = leading ? 0 : found.magnitude >> 16;
    if (!leading) counts.clear();
    const Element* row = first;
    for (uint64_t i = 0; i < rows; ++i, row += stride) {
      for (uint64_t j = 0; j < cols; ++j) {
        const uint32_t magnitude = row[j] & kMagnitude<Element>;
        if (leading) {
          counts.add(j % kTables, magnitude >> shift);
        } else if (magnitude >> 16 == above) {
          counts.add(j % kTables, magnitude & 0xffff);
        }
      }
    }
    counts.merge();
    if (found.magnitude == 0) counts[0] -= zeros;
    // What lies above infinity is NaN: the last digit that may be chosen.
    uint32_t last = kDigits - 1;
    if (leading) {
      last = infinity >> shift;
    } else if (above == infinity >> 16) {
      last = infinity & 0xffff;
    }
    uint32_t digit = 0;
    while (digit < last && counts[digit] < found.ties) found.ties -= counts[digit++];
    found.magnitude |= digit << shift;
    if (shift == 0) {
      found.ties = std::min(found.ties, counts[digit]);
      return found;
    }
  }
}

// Elements that equal the threshold; if it is 0, those are the -0.0: +0.0 is not pruned again.
template <typename Element>
bool is_tie(Element bits, Element magnitude) {
  return (bits & kMagnitude<Element>) == magnitude && bits != 0;
}

template <typename Element>
void cut_block(Element* block, uint64_t count, Threshold& threshold) {
  const Element magnitude = static_cast<Element>(threshold.magnitude);
  Element limit = magnitude;  // prune below it
  if (threshold.ties > 0) {
    uint32_t ties = 0;
    for (uint64_t i = 0; i < count; ++i) ties += is_tie(block[i], magnitude);
    if (ties <= threshold.ties) {
      threshold.ties -= ties;
      ++limit;
    } else {
      for (uint64_t i = 0; threshold.ties > 0; ++i) {
        if (!is_tie(block[i], magnitude)) continue;
        block[i] = 0;
        --threshold.ties;
      }
    }
  }
  for (uint64_t i = 0; i < count; ++i) {
    block[i] = (block[i] & kMagnitude<Element>) < limit ? Element{0} : block[i];
  }
}

template <typename Element>
uint64_t count_zeros(const Element* first, int64_t stride, uint64_t rows, uint64_t cols) {
  uint64_t zeros = 0;
  for (uint64_t i = 0; i < rows; ++i, first += stride) {
    for (uint64_t begin = 0; begin < cols; begin += kBlock) {
      const uint64_t end = std::min(cols, begin + kBlock);
      Element some = 0;  // as narrow as the elements: the compiler then counts whole vectors
      for (uint64_t j = begin; j < end; ++j) some += first[j] == 0;
      zeros += some;
    }
  }
  return zeros;
}

}  // namespace

template <typename Element>
void prune(Element* first, int64_t stride, uint64_t rows, uint64_t cols, uint32_t infinity,
           uint64_t wanted) {
  const uint64_t zeros = count_zeros(first, stride, rows, cols);
  if (wanted <= zeros) return;
  Threshold threshold =
      find_threshold(first, stride, rows, cols, infinity, zeros, wanted - zeros);
  for (uint64_t i = 0; i < rows; ++i, first += stride) {
    for (uint64_t begin = 0; begin < cols; begin += kBlock) {
      cut_block(first + begin, std::min(cols - begin, kBlock), threshold);
    }
  }
}

template void prune(uint16_t*, int64_t, uint64_t, uint64_t, uint32_t, uint64_t);
template void prune(uint32_t*, int64_t, uint64_t, uint64_t, uint32_t, uint64_t);

}  // namespace encode
}  // namespace tierd
