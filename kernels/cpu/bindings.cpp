// Python's door to the kernels: checks sizes, shares tile rows among threads, releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "kernels.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tierd {
namespace {

template <typename Scalar, size_t Dims>
using Array = nb::ndarray<Scalar, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

// Tokens prepared at once: bounds the scratch to 128 bytes for each column.
constexpr uint32_t kTokensPerPass = 32;

// Outputs from this size on bypass the caches. Measured on Zen 5 with 32 MiB of L3, expanding and
// then multiplying with the output: at 32 MiB a quarter faster, at 8 MiB a quarter slower.
constexpr uint64_t kStreamBytes = 16u << 20;

[[noreturn]] void refuse(const std::string& text) { throw nb::value_error(text.c_str()); }

const Kernels& kernels_named(const std::string& name) {
  for (const Kernels* const* each = kAllKernels; *each != nullptr; ++each) {
    if (name != (*each)->name) continue;
    if (!(*each)->supported()) refuse("this processor cannot run kernel '" + name + "'");
    return **each;
  }
  refuse("no kernel is named '" + name + "'");
}

uint32_t checked_u32(size_t value, const char* what) {
  if (value > UINT32_MAX - kTile) {
    refuse(std::to_string(value) + " " + what + " are more than 2^32 - 65");
  }
  return static_cast<uint32_t>(value);
}

uint32_t tiles_over(uint32_t length) { return (length + kTile - 1) / kTile; }

template <typename Element>
Packed packed(const Array<const uint64_t, 1>& bitmap, const Array<const uint32_t, 1>& offsets,
              const Array<const Element, 1>& values, uint32_t tile_rows, uint32_t cols) {
  const uint32_t tile_cols = tiles_over(cols);
  const uint64_t tiles = uint64_t{tile_rows} * tile_cols;
  if (bitmap.size() != tiles * kTile || offsets.size() != tiles + 1) {
    refuse("bitmap has " + std::to_string(bitmap.size()) + " words and offsets " +
           std::to_string(offsets.size()) + " entries, " + std::to_string(tiles) + " tiles need " +
           std::to_string(tiles * kTile) + " and " + std::to_string(tiles + 1));
  }
  Packed m{};
  m.codec = Codec::kRaw;
  m.dtype = sizeof(Element) == 4 ? Dtype::kF32 : Dtype::kBF16;
  m.bitmap = bitmap.data();
  m.offsets = offsets.data();
  m.values = reinterpret_cast<const uint8_t*>(values.data());
  m.values_bytes = values.size() * sizeof(Element);
  m.item_bytes = sizeof(Element);
  m.cols = cols;
  m.tile_cols = tile_cols;
  return m;
}

// The lowest faulty tile that any thread met, with what is wrong with it.
class Faults {
 public:
  void report(Fault fault, uint64_t tile) {
    if (fault == Fault::kNone) return;
    const uint64_t mine = tile << 8 | static_cast<uint64_t>(fault);
    uint64_t lowest = lowest_.load();
    while (mine < lowest && !lowest_.compare_exchange_weak(lowest, mine)) {
    }
  }

  void raise(const Packed& m) const {
    const uint64_t lowest = lowest_.load();
    if (lowest == UINT64_MAX) return;
    const uint64_t tile = lowest >> 8;
    const std::string where =
        "tile " + std::to_string(tile) + " (tile row " + std::to_string(tile / m.tile_cols) +
        ", column " + std::to_string(tile % m.tile_cols) + ")";
    const std::string run = "offsets " + std::to_string(m.offsets[tile]) + ".." +
                            std::to_string(m.offsets[tile + 1]) + " (16-byte units)";
    switch (static_cast<Fault>(lowest & 0xff)) {
      case Fault::kOffsetsDescend:
        refuse(where + ": " + run + " descend");
      case Fault::kRunPastEnd:
        refuse(where + ": " + run + " pass the end of values, which has " +
               std::to_string(m.values_bytes) + " bytes");
      case Fault::kRunLength:
        refuse(where + ": " + run + " do not fit the number of set bits in its bitmap");
      default:
        refuse(where + ": bitmap has bits outside the matrix of " + std::to_string(m.rows) +
               " rows and " + std::to_string(m.cols) + " columns");
    }
  }

 private:
  std::atomic<uint64_t> lowest_{UINT64_MAX};
};

template <typename Element>
void expand(const Array<const uint64_t, 1>& bitmap, const Array<const uint32_t, 1>& offsets,
            const Array<const Element, 1>& values, const Array<Element, 2>& out, size_t tile_rows,
            size_t first, int threads, const std::string& kernel) {
  const Kernels& kernels = kernels_named(kernel);
  const uint32_t out_rows = checked_u32(out.shape(0), "rows");
  const uint32_t cols = checked_u32(out.shape(1), "columns");
  const uint32_t total = checked_u32(tile_rows, "tile rows");
  const uint32_t count = tiles_over(out_rows);
  if (first > total || count > total - first || total > UINT32_MAX / kTile) {
    refuse("out holds tile rows " + std::to_string(first) + ".." + std::to_string(first + count) +
           ", the matrix has " + std::to_string(total));
  }
  // Only the last tile row of the matrix may be cut short.
  if (out_rows % kTile != 0 && first + count != total) {
    refuse("out has " + std::to_string(out_rows) + " rows and ends inside the matrix");
  }
  struct Job {
    const Kernels& kernels;
    Packed m;
    Element* out;
    uint32_t first;
    bool streaming;
    Faults faults;
  } job{kernels,   packed<Element>(bitmap, offsets, values, total, cols),
        out.data(), static_cast<uint32_t>(first),
        false,     {}};
  const uint64_t row_bytes = uint64_t{cols} * sizeof(Element);
  job.streaming = out_rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 &&
                  reinterpret_cast<uintptr_t>(out.data()) % 64 == 0;
  job.m.rows = static_cast<uint32_t>(first) * kTile + out_rows;
  if (cols == 0) return;
  {
    nb::gil_scoped_release released;
    parallel_for(
        count, threads,
        [](void* context, uint32_t index) {
          Job& j = *static_cast<Job*>(context);
          Element* to = j.out + uint64_t{index} * kTile * j.m.cols;
          uint64_t tile = 0;
          const Fault fault = j.kernels.expand(j.m, j.first + index, to, j.m.cols, j.streaming, &tile);
          j.faults.report(fault, tile);
        },
        &job);
  }
  job.faults.raise(job.m);
}

// Grows, and is kept by its thread: a product for one token would spend its time in malloc.
float* scratch(size_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local size_t capacity = 0;
  if (floats > capacity) {
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))));
    capacity = buffer ? floats : 0;
    if (!buffer) throw std::bad_alloc();
  }
  return buffer.get();
}

template <typename Element>
void linear(const Array<const uint64_t, 1>& bitmap, const Array<const uint32_t, 1>& offsets,
            const Array<const Element, 1>& values, const Array<const Element, 2>& x,
            const Array<float, 2>& out, bool f16, int threads, const std::string& kernel) {
  struct Job {
    const Kernels& kernels;
    Packed m;
    const float* prepared;
    uint32_t tokens;
    float* out;
    Faults faults;
  };
  const Kernels& kernels = kernels_named(kernel);
  const uint32_t rows = checked_u32(out.shape(1), "rows");
  const uint32_t cols = checked_u32(x.shape(1), "columns");
  if (x.shape(0) != out.shape(0)) {
    refuse("x has " + std::to_string(x.shape(0)) + " tokens and out " +
           std::to_string(out.shape(0)));
  }
  Job job{kernels, packed<Element>(bitmap, offsets, values, tiles_over(rows), cols),
          nullptr, 0,
          nullptr, {}};
  job.m.rows = rows;
  if (f16) job.m.dtype = Dtype::kF16;
  const uint64_t columns = uint64_t{job.m.tile_cols} * kTile;
  {
    nb::gil_scoped_release released;
    for (size_t first = 0; first < x.shape(0); first += kTokensPerPass) {
      const size_t left = x.shape(0) - first;
      job.tokens = static_cast<uint32_t>(left < kTokensPerPass ? left : kTokensPerPass);
      job.out = out.data() + first * rows;
      float* prepared = scratch(job.tokens * columns);
      job.prepared = prepared;
      for (uint32_t token = 0; token < job.tokens; token += kTokenBlock) {
        const uint32_t tokens = job.tokens - token < kTokenBlock ? job.tokens - token : kTokenBlock;
        kernels.prepare(job.m, x.data() + (first + token) * cols, tokens,
                        prepared + token * columns);
      }
      parallel_for(
          tiles_over(rows), threads,
          [](void* context, uint32_t tile_row) {
            Job& j = *static_cast<Job*>(context);
            const uint64_t columns = uint64_t{j.m.tile_cols} * kTile;
            for (uint32_t token = 0; token < j.tokens; token += kTokenBlock) {
              const uint32_t left = j.tokens - token;
              uint64_t tile = 0;
              const Fault fault = j.kernels.linear(
                  j.m, tile_row, j.prepared + token * columns,
                  left < kTokenBlock ? left : kTokenBlock, j.out + uint64_t{token} * j.m.rows,
                  j.m.rows, &tile);
              j.faults.report(fault, tile);
            }
          },
          &job);
    }
  }
  job.faults.raise(job.m);
}

nb::tuple kernel_names() {
  nb::list names;
  for (const Kernels* const* each = kAllKernels; *each != nullptr; ++each) {
    names.append(nb::make_tuple((*each)->name, (*each)->supported()));
  }
  return nb::tuple(names);
}

template <typename Element>
void bind(nb::module_& module) {
  module.def("expand", &expand<Element>, "bitmap"_a.noconvert(), "offsets"_a.noconvert(),
             "values"_a.noconvert(), "out"_a.noconvert(), "tile_rows"_a, "first"_a, "threads"_a,
             "kernel"_a,
             "Write tile rows first.. to out; tile_rows is the number in the whole matrix.");
  module.def("linear", &linear<Element>, "bitmap"_a.noconvert(), "offsets"_a.noconvert(),
             "values"_a.noconvert(), "x"_a.noconvert(), "out"_a.noconvert(), "f16"_a, "threads"_a,
             "kernel"_a, "out = x @ W.T; two-byte elements are BF16 unless f16.");
}

}  // namespace
}  // namespace tierd

NB_MODULE(_cpu, module) {
  module.doc() = "C++ kernels over the tile layout; tierd_kernels is the interface.";
  module.attr("MAX_THREADS") = tierd::kMaxThreads;
  module.def("kernel_names", &tierd::kernel_names,
             nb::sig("def kernel_names() -> tuple[tuple[str, bool], ...]"),
             "(name, whether this processor can run it) of every kernel built, slowest first.");
  tierd::bind<uint16_t>(module);
  tierd::bind<uint32_t>(module);
}
