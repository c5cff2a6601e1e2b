// Runs one kernel on cases from a file, without Python: for another processor, under an emulator.
// Usage: cross_check KERNEL CASES RESULTS; see cross_check.py, which writes and reads the files.
//
// A case: the numbers below, then the arrays. A result: fault and rows of `expand`, fault and sums
// of `linear`. Every array ends at a forbidden page.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../kernels.h"

namespace {

using namespace tierd;

struct Header {
  uint32_t codec, dtype, rows, cols, group_tiles, groups, tokens, masked;
  uint64_t bitmap, offsets, values, heads, scales, x;  // bytes
};

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "cross_check: %s\n", what);
  exit(2);
}

uint8_t* guarded(uint64_t nbytes) {
  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t inside = (nbytes + page - 1) / page * page;
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  void* at = mmap(nullptr, inside + page, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (at == MAP_FAILED) fail("mmap");
  uint8_t* end = static_cast<uint8_t*>(at) + inside;
  if (mprotect(end, page, PROT_NONE) != 0) fail("mprotect");
  return end - nbytes;
}

template <typename Scalar>
const Scalar* array(FILE* from, uint64_t nbytes) {
  uint8_t* to = guarded(nbytes);
  if (fread(to, 1, nbytes, from) != nbytes) fail("the cases end early");
  return reinterpret_cast<const Scalar*>(to);
}

void write(FILE* to, const void* from, uint64_t nbytes) {
  if (fwrite(from, 1, nbytes, to) != nbytes) fail("the results cannot be written");
}

void run(const Kernels& kernels, const Header& h, FILE* cases, FILE* results) {
  Packed m{};
  m.codec = static_cast<Codec>(h.codec);
  m.dtype = static_cast<Dtype>(h.dtype);
  m.bitmap = array<uint64_t>(cases, h.bitmap);
  if (h.masked == 0) m.bitmap = nullptr;
  m.offsets = array<uint32_t>(cases, h.offsets);
  m.values = array<uint8_t>(cases, h.values);
  m.values_bytes = h.values;
  m.heads = array<uint32_t>(cases, h.heads);
  m.scales = array<uint16_t>(cases, h.scales);
  m.group_tiles = h.group_tiles;
  m.groups = h.groups;
  m.item_bytes = m.dtype == Dtype::kF32 ? 4 : 2;
  m.rows = h.rows;
  m.cols = h.cols;
  m.tile_cols = (h.cols + kTile - 1) / kTile;
  const uint8_t* x = array<uint8_t>(cases, h.x);
  const uint32_t tile_rows = (h.rows + kTile - 1) / kTile;

  const uint64_t row_bytes = uint64_t{h.cols} * m.item_bytes;
  const uint64_t sum_bytes = uint64_t{h.tokens} * h.rows * sizeof(float);
  uint8_t* expanded = guarded(h.rows * row_bytes);
  float* sums = reinterpret_cast<float*>(guarded(sum_bytes));
  float* prepared = reinterpret_cast<float*>(
      guarded(uint64_t{m.tile_cols} * h.tokens * kTile * sizeof(float)));
  uint32_t faults[2] = {0, 0};
  uint64_t tile = 0;
  kernels.prepare(m, x, h.tokens, prepared);
  for (uint32_t row = 0; row < tile_rows; ++row) {
    faults[0] |= static_cast<uint32_t>(
        kernels.expand(m, row, expanded + row * kTile * row_bytes, h.cols, false, &tile));
    faults[1] |= static_cast<uint32_t>(
        kernels.linear(m, row, prepared, h.tokens, sums, h.rows, &tile));
  }
  write(results, &faults[0], sizeof faults[0]);
  write(results, expanded, h.rows * row_bytes);
  write(results, &faults[1], sizeof faults[1]);
  write(results, sums, sum_bytes);
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) fail("usage: cross_check KERNEL CASES RESULTS");
  const tierd::Kernels* const* each = tierd::kAllKernels;
  while (*each != nullptr && __builtin_strcmp((*each)->name, words[1]) != 0) ++each;
  if (*each == nullptr || !(*each)->supported()) fail("no such kernel here");
  FILE* cases = fopen(words[2], "rb");
  FILE* results = fopen(words[3], "wb");
  if (cases == nullptr || results == nullptr) fail("a file cannot be opened");
  Header header;
  while (fread(&header, sizeof header, 1, cases) == 1) run(**each, header, cases, results);
  return fclose(results) == 0 ? 0 : 2;
}
