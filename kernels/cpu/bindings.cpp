// Python's door to the kernels: checks sizes, shares tile rows among threads, releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "interface.h"
#include "kernels.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tierd {
namespace {

template <typename Scalar>
using Array = nb::ndarray<const Scalar, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename Scalar>
using Optional = std::optional<Array<Scalar>>;
template <typename Scalar>
using Rows = nb::ndarray<Scalar, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

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

template <typename Array>
void check_size(const char* name, const Array& array, uint64_t wanted, const std::string& why) {
  if (array.size() == wanted) return;
  refuse(std::string(name) + " has " + std::to_string(array.size()) + " entries, " + why + " need " +
         std::to_string(wanted));
}

template <typename Scalar>
const Scalar* present(const char* name, const Optional<Scalar>& array, uint64_t wanted,
                      const std::string& why) {
  if (!array) refuse(std::string(name) + " is missing");
  check_size(name, *array, wanted, why);
  return array->data();
}

Codec codec_named(const std::string& name) {
  if (name == "raw") return Codec::kRaw;
  if (name == "exponent-packed") return Codec::kExponent;
  if (name == "int8") return Codec::kInt8;
  if (name == "int4") return Codec::kInt4;
  refuse("codec '" + name + "' is unknown");
}

Dtype dtype_named(const std::string& name) {
  if (name == "BF16") return Dtype::kBF16;
  if (name == "F16") return Dtype::kF16;
  if (name == "F32") return Dtype::kF32;
  refuse("dtype '" + name + "' is unknown");
}

Packed packed(const std::string& codec, const std::string& dtype, size_t rows, size_t cols,
              size_t group, const Optional<uint64_t>& bitmap, const Array<uint32_t>& offsets,
              const Array<uint8_t>& values, const Optional<uint32_t>& heads,
              const Optional<uint16_t>& scales) {
  Packed m{};
  m.codec = codec_named(codec);
  m.dtype = dtype_named(dtype);
  m.item_bytes = m.dtype == Dtype::kF32 ? 4 : 2;
  m.rows = checked_u32(rows, "rows");
  m.cols = checked_u32(cols, "columns");
  m.tile_cols = tiles_over(m.cols);
  const uint32_t tile_rows = tiles_over(m.rows);
  const uint64_t tiles = uint64_t{tile_rows} * m.tile_cols;
  const std::string why = std::to_string(tiles) + " tiles";
  if (bitmap || m.codec == Codec::kRaw) m.bitmap = present("bitmap", bitmap, tiles * kTile, why);
  check_size("offsets", offsets, tiles + 1, why);
  m.offsets = offsets.data();
  m.values = values.data();
  m.values_bytes = values.size();
  if (m.codec == Codec::kExponent) m.heads = present("heads", heads, tiles, why);
  if (m.codec == Codec::kInt8 || m.codec == Codec::kInt4) {
    const uint32_t columns = checked_u32(group, "columns of a group");
    if (columns == 0 || columns % kTile != 0) {
      refuse("group " + std::to_string(columns) + " is not a positive multiple of 64");
    }
    m.group_tiles = columns / kTile;
    m.groups = (m.tile_cols + m.group_tiles - 1) / m.group_tiles;
    m.scales = present("scales", scales, uint64_t{tile_rows} * m.groups * kTile,
                       std::to_string(tile_rows) + " tile rows of " + std::to_string(m.groups) +
                           " groups");
  }
  return m;
}

template <typename Element>
void check_element(const char* name, const Packed& m) {
  if (sizeof(Element) == m.item_bytes) return;
  refuse(std::string(name) + " has " + std::to_string(sizeof(Element)) +
         "-byte elements, the matrix " + std::to_string(m.item_bytes));
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
        refuse(where + ": " + run + " do not fit its record");
      case Fault::kHead:
        refuse(where + ": head " + std::to_string(m.heads[tile]) + " cannot be");
      case Fault::kEscape:
        refuse(where + ": escapes do not ascend within its elements");
      default:
        refuse(where + ": bitmap has bits outside the matrix of " + std::to_string(m.rows) +
               " rows and " + std::to_string(m.cols) + " columns");
    }
  }

 private:
  std::atomic<uint64_t> lowest_{UINT64_MAX};
};

template <typename Element>
void expand(const std::string& codec, const std::string& dtype, size_t rows, size_t cols,
            size_t group, const Optional<uint64_t>& bitmap, const Array<uint32_t>& offsets,
            const Array<uint8_t>& values, const Optional<uint32_t>& heads,
            const Optional<uint16_t>& scales, const Rows<Element>& out, size_t first, int threads,
            const std::string& kernel) {
  struct Job {
    const Kernels& kernels;
    Packed m;
    Element* out;
    uint32_t first;
    bool streaming;
    Faults faults;
  } job{kernels_named(kernel),
        packed(codec, dtype, rows, cols, group, bitmap, offsets, values, heads, scales),
        out.data(), 0, false, {}};
  const Packed& m = job.m;
  check_element<Element>("out", m);
  const uint32_t total = tiles_over(m.rows);
  const uint32_t out_rows = checked_u32(out.shape(0), "rows");
  const uint32_t count = tiles_over(out_rows);
  // Only the matrix's own last tile row may be cut short.
  if (first > total || count > total - first || out.shape(1) != m.cols ||
      (out_rows % kTile != 0 && first * kTile + out_rows != m.rows) ||
      (out_rows != 0 && first * kTile + out_rows > m.rows)) {
    refuse("out has " + std::to_string(out_rows) + " rows and " + std::to_string(out.shape(1)) +
           " columns from tile row " + std::to_string(first) + " on, the matrix has " +
           std::to_string(m.rows) + " and " + std::to_string(m.cols));
  }
  job.first = static_cast<uint32_t>(first);
  const uint64_t row_bytes = uint64_t{m.cols} * m.item_bytes;
  job.streaming = out_rows * row_bytes >= kStreamBytes && row_bytes % 64 == 0 &&
                  reinterpret_cast<uintptr_t>(job.out) % 64 == 0;
  if (m.cols == 0) return;
  {
    nb::gil_scoped_release released;
    parallel_for(
        count, threads,
        [](void* context, uint32_t index) {
          Job& j = *static_cast<Job*>(context);
          Element* to = j.out + uint64_t{index} * kTile * j.m.cols;
          uint64_t tile = 0;
          const Fault fault =
              j.kernels.expand(j.m, j.first + index, to, j.m.cols, j.streaming, &tile);
          j.faults.report(fault, tile);
        },
        &job);
  }
  job.faults.raise(m);
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
void linear(const std::string& codec, const std::string& dtype, size_t rows, size_t cols,
            size_t group, const Optional<uint64_t>& bitmap, const Array<uint32_t>& offsets,
            const Array<uint8_t>& values, const Optional<uint32_t>& heads,
            const Optional<uint16_t>& scales, const Rows<const Element>& x, const Rows<float>& out,
            int threads, const std::string& kernel) {
  struct Job {
    const Kernels& kernels;
    Packed m;
    const float* prepared;
    uint32_t tokens;
    float* out;
    Faults faults;
  } job{kernels_named(kernel),
        packed(codec, dtype, rows, cols, group, bitmap, offsets, values, heads, scales),
        nullptr, 0, nullptr, {}};
  const Packed& m = job.m;
  check_element<Element>("x", m);
  const size_t tokens_in_all = x.shape(0);
  if (x.shape(1) != m.cols || out.shape(1) != m.rows || out.shape(0) != tokens_in_all) {
    refuse("x has " + std::to_string(tokens_in_all) + " tokens of " + std::to_string(x.shape(1)) +
           " columns and out " + std::to_string(out.shape(0)) + " of " +
           std::to_string(out.shape(1)) + " rows, the matrix has " + std::to_string(m.rows) +
           " rows and " + std::to_string(m.cols) + " columns");
  }
  const uint64_t columns = uint64_t{m.tile_cols} * kTile;
  {
    nb::gil_scoped_release released;
    for (size_t first = 0; first < tokens_in_all; first += kTokensPerPass) {
      const size_t left = tokens_in_all - first;
      job.tokens = static_cast<uint32_t>(left < kTokensPerPass ? left : kTokensPerPass);
      job.out = out.data() + first * m.rows;
      float* prepared = scratch(job.tokens * columns);
      job.prepared = prepared;
      const uint32_t block = job.kernels.token_block;
      for (uint32_t token = 0; token < job.tokens; token += block) {
        const uint32_t tokens = job.tokens - token < block ? job.tokens - token : block;
        job.kernels.prepare(m, x.data() + (first + token) * m.cols, tokens,
                            prepared + token * columns);
      }
      parallel_for(
          tiles_over(m.rows), threads,
          [](void* context, uint32_t tile_row) {
            Job& j = *static_cast<Job*>(context);
            const uint64_t columns = uint64_t{j.m.tile_cols} * kTile;
            const uint32_t block = j.kernels.token_block;
            for (uint32_t token = 0; token < j.tokens; token += block) {
              const uint32_t left = j.tokens - token;
              uint64_t tile = 0;
              const Fault fault = j.kernels.linear(
                  j.m, tile_row, j.prepared + token * columns,
                  left < block ? left : block, j.out + uint64_t{token} * j.m.rows,
                  j.m.rows, &tile);
              j.faults.report(fault, tile);
            }
          },
          &job);
    }
  }
  job.faults.raise(m);
}

nb::tuple kernel_names() {
  nb::list names;
  for (const Kernels* const* each = kAllKernels; *each != nullptr; ++each) {
    names.append(nb::make_tuple((*each)->name, (*each)->supported()));
  }
  return nb::tuple(names);
}

// No array is converted: without noconvert() nanobind makes integers of floats without a word.
template <typename Element>
void bind(nb::module_& module) {
  module.def("expand", &expand<Element>, "codec"_a, "dtype"_a, "rows"_a, "cols"_a, "group"_a,
             "bitmap"_a.noconvert().none(), "offsets"_a.noconvert(), "values"_a.noconvert(),
             "heads"_a.noconvert().none(), "scales"_a.noconvert().none(), "out"_a.noconvert(),
             "first"_a, "threads"_a, "kernel"_a,
             "Write the tile rows from first on to out, as many as it holds.");
  module.def("linear", &linear<Element>, "codec"_a, "dtype"_a, "rows"_a, "cols"_a, "group"_a,
             "bitmap"_a.noconvert().none(), "offsets"_a.noconvert(), "values"_a.noconvert(),
             "heads"_a.noconvert().none(), "scales"_a.noconvert().none(), "x"_a.noconvert(),
             "out"_a.noconvert(), "threads"_a, "kernel"_a, "out = x @ W.T.");
}

}  // namespace
}  // namespace tierd

NB_MODULE(_cpu, module) {
  module.doc() = "C++ kernels over the tile layout; tierd_kernels is the interface.";
  module.attr("INTERFACE") = tierd::kInterface;
  module.attr("MAX_THREADS") = tierd::kMaxThreads;
  module.def("kernel_names", &tierd::kernel_names,
             nb::sig("def kernel_names() -> tuple[tuple[str, bool], ...]"),
             "(name, whether this processor can run it) of every kernel built, slowest first.");
  module.def(
      "share_threads",
      [](uintptr_t runtime, int team) {
        tierd::share_threads(reinterpret_cast<tierd::OpenMp>(runtime), team);
      },
      "runtime"_a, "team"_a,
      "Run loops on the team of the OpenMP runtime whose GOMP_parallel this is the address of.");
  tierd::bind<uint16_t>(module);
  tierd::bind<uint32_t>(module);
}
