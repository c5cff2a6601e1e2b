// Python's door to the encoder: checks sizes, releases the GIL. One call uses one thread.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <string>
#include <tuple>

#include "encode.h"
#include "encode_passes.h"
#include "encode_prune.h"
#include "encode_quantise.h"
#include "interface.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tierd {
namespace encode {
namespace {

// Rows may lie apart; inside a row elements touch.
template <typename Element>
using Rows = nb::ndarray<Element, nb::ndim<2>, nb::device::cpu>;
template <typename Element>
using Array = nb::ndarray<Element, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& text) { throw nb::value_error(text.c_str()); }

const Encoder& encoder_named(const std::string& name) {
  for (const Encoder* const* each = kAllEncoders; *each != nullptr; ++each) {
    if (name != (*each)->name) continue;
    if (!(*each)->supported()) refuse("this processor cannot run encoder '" + name + "'");
    return **each;
  }
  refuse("no encoder is named '" + name + "'");
}

template <typename Element>
void check_rows(const Rows<Element>& bits) {
  if (bits.shape(1) > 1 && bits.shape(0) > 0 && bits.stride(1) != 1) {
    refuse("elements of a row are " + std::to_string(bits.stride(1)) + " apart, needs 1");
  }
}

template <typename Element>
Matrix matrix(const Rows<const Element>& bits) {
  check_rows(bits);
  return {reinterpret_cast<const uint8_t*>(bits.data()), bits.stride(0), bits.shape(0),
          bits.shape(1), sizeof(Element)};
}

void check_size(const char* name, size_t found, uint64_t needed) {
  if (found == needed) return;
  refuse(std::string(name) + " has " + std::to_string(found) + " entries, needs " +
         std::to_string(needed));
}

void check_values(size_t nbytes, const Array<const uint32_t>& offsets) {
  check_size("values", nbytes, uint64_t{offsets.data()[offsets.size() - 1]} * kRunUnit);
}

void check_written(uint64_t wrong_tile) {
  if (wrong_tile == kNoTile) return;
  refuse("tile " + std::to_string(wrong_tile) + ": the structure is not that of the matrix");
}

template <typename Element>
std::tuple<uint64_t, uint64_t, uint64_t> measure(const Rows<const Element>& bits,
                                                 const std::string& encoder) {
  const Encoder& with = encoder_named(encoder);
  const Matrix m = matrix(bits);
  Sizes sizes;
  {
    nb::gil_scoped_release released;
    sizes = encode::measure(with, m);
  }
  return {sizes.raw, sizes.masked, sizes.dense_form};
}

template <typename Element>
uint64_t raw_structure(const Rows<const Element>& bits, const Array<uint64_t>& bitmap,
                       const Array<uint32_t>& offsets, const std::string& encoder) {
  const Encoder& with = encoder_named(encoder);
  const Matrix m = matrix(bits);
  check_size("bitmap", bitmap.size(), m.tiles() * kTile);
  check_size("offsets", offsets.size(), m.tiles() + 1);
  nb::gil_scoped_release released;
  return encode::raw_structure(with, m, bitmap.data(), offsets.data());
}

template <typename Element>
void raw_values(const Rows<const Element>& bits, const Array<const uint64_t>& bitmap,
                const Array<const uint32_t>& offsets, const Array<Element>& values,
                const std::string& encoder) {
  const Encoder& with = encoder_named(encoder);
  const Matrix m = matrix(bits);
  check_size("bitmap", bitmap.size(), m.tiles() * kTile);
  check_size("offsets", offsets.size(), m.tiles() + 1);
  check_values(values.nbytes(), offsets);
  uint64_t wrong;
  {
    nb::gil_scoped_release released;
    wrong = encode::raw_values(with, m, bitmap.data(), offsets.data(),
                               reinterpret_cast<uint8_t*>(values.data()));
  }
  check_written(wrong);
}

template <typename Element>
uint64_t exponent_structure(const Rows<const Element>& bits,
                            const std::optional<Array<uint64_t>>& bitmap,
                            const Array<uint32_t>& offsets, const Array<uint32_t>& heads,
                            const std::string& encoder) {
  const Encoder& with = encoder_named(encoder);
  const Matrix m = matrix(bits);
  if (bitmap) check_size("bitmap", bitmap->size(), m.tiles() * kTile);
  check_size("offsets", offsets.size(), m.tiles() + 1);
  check_size("heads", heads.size(), m.tiles());
  nb::gil_scoped_release released;
  return encode::exponent_structure(with, m, bitmap ? bitmap->data() : nullptr, offsets.data(),
                                    heads.data());
}

template <typename Element>
void exponent_values(const Rows<const Element>& bits,
                     const std::optional<Array<const uint64_t>>& bitmap,
                     const Array<const uint32_t>& offsets, const Array<const uint32_t>& heads,
                     const Array<uint8_t>& values, const std::string& encoder) {
  const Encoder& with = encoder_named(encoder);
  const Matrix m = matrix(bits);
  if (bitmap) check_size("bitmap", bitmap->size(), m.tiles() * kTile);
  check_size("offsets", offsets.size(), m.tiles() + 1);
  check_size("heads", heads.size(), m.tiles());
  check_values(values.nbytes(), offsets);
  uint64_t wrong;
  {
    nb::gil_scoped_release released;
    wrong = encode::exponent_values(with, m, bitmap ? bitmap->data() : nullptr, offsets.data(),
                                    heads.data(), values.data());
  }
  check_written(wrong);
}

template <typename Element>
Quantised quantised(const std::string& dtype, bool int4, uint64_t group) {
  const bool two_bytes = sizeof(Element) == 2;
  if (group == 0 || group % kTile != 0) {
    refuse("group of " + std::to_string(group) + " columns, needs a positive multiple of 64");
  }
  if (two_bytes && dtype == "BF16") return {Dtype::kBF16, int4, group};
  if (two_bytes && dtype == "F16") return {Dtype::kF16, int4, group};
  if (!two_bytes && dtype == "F32") return {Dtype::kF32, int4, group};
  refuse("dtype '" + dtype + "' does not have elements of " + std::to_string(sizeof(Element)) +
         " bytes");
}

template <typename Element>
bool choose_scales(const Rows<const Element>& bits, const std::string& dtype, bool int4,
                   uint64_t group, const Array<uint16_t>& scales, const std::string& encoder) {
  const Encoder& with = encoder_named(encoder);
  const Matrix m = matrix(bits);
  const Quantised q = quantised<Element>(dtype, int4, group);
  check_size("scales", scales.size(), q.scale_count(m));
  nb::gil_scoped_release released;
  return encode::choose_scales(with, m, q, scales.data());
}

template <typename Element>
uint64_t level_structure(const Rows<const Element>& bits, const std::string& dtype, bool int4,
                         uint64_t group, const Array<const uint16_t>& scales,
                         const std::optional<Array<uint64_t>>& bitmap,
                         const Array<uint32_t>& offsets, const std::string& encoder) {
  const Encoder& with = encoder_named(encoder);
  const Matrix m = matrix(bits);
  const Quantised q = quantised<Element>(dtype, int4, group);
  check_size("scales", scales.size(), q.scale_count(m));
  if (bitmap) check_size("bitmap", bitmap->size(), m.tiles() * kTile);
  check_size("offsets", offsets.size(), m.tiles() + 1);
  nb::gil_scoped_release released;
  return encode::level_structure(with, m, q, scales.data(), bitmap ? bitmap->data() : nullptr,
                                 offsets.data());
}

template <typename Element>
void level_values(const Rows<const Element>& bits, const std::string& dtype, bool int4,
                  uint64_t group, const Array<const uint16_t>& scales,
                  const std::optional<Array<const uint64_t>>& bitmap,
                  const Array<const uint32_t>& offsets, const Array<uint8_t>& values,
                  const std::string& encoder) {
  const Encoder& with = encoder_named(encoder);
  const Matrix m = matrix(bits);
  const Quantised q = quantised<Element>(dtype, int4, group);
  check_size("scales", scales.size(), q.scale_count(m));
  if (bitmap) check_size("bitmap", bitmap->size(), m.tiles() * kTile);
  check_size("offsets", offsets.size(), m.tiles() + 1);
  check_values(values.nbytes(), offsets);
  uint64_t wrong;
  {
    nb::gil_scoped_release released;
    wrong = encode::level_values(with, m, q, scales.data(), bitmap ? bitmap->data() : nullptr,
                                 offsets.data(), values.data());
  }
  check_written(wrong);
}

template <typename Element>
void prune(const Rows<Element>& bits, uint32_t infinity, uint64_t wanted) {
  check_rows(bits);
  nb::gil_scoped_release released;
  encode::prune(bits.data(), bits.stride(0), bits.shape(0), bits.shape(1), infinity, wanted);
}

nb::tuple encoder_names() {
  nb::list names;
  for (const Encoder* const* each = kAllEncoders; *each != nullptr; ++each) {
    names.append(nb::make_tuple((*each)->name, (*each)->supported()));
  }
  return nb::tuple(names);
}

template <typename Element>
void bind(nb::module_& module) {
  module.def("measure", &measure<Element>, "bits"_a.noconvert(), "encoder"_a,
             "Units of values: raw, exponent-packed with a bitmap, and in the dense form.");
  module.def("raw_structure", &raw_structure<Element>, "bits"_a.noconvert(),
             "bitmap"_a.noconvert(), "offsets"_a.noconvert(), "encoder"_a,
             "Fill bitmap and offsets. Returns the units of values.");
  module.def("raw_values", &raw_values<Element>, "bits"_a.noconvert(), "bitmap"_a.noconvert(),
             "offsets"_a.noconvert(), "values"_a.noconvert(), "encoder"_a, "Fill values.");
  module.def("exponent_structure", &exponent_structure<Element>, "bits"_a.noconvert(),
             "bitmap"_a.noconvert().none(), "offsets"_a.noconvert(), "heads"_a.noconvert(),
             "encoder"_a, "Fill bitmap, offsets and heads. Returns the units of values.");
  module.def("exponent_values", &exponent_values<Element>, "bits"_a.noconvert(),
             "bitmap"_a.noconvert().none(), "offsets"_a.noconvert(), "heads"_a.noconvert(),
             "values"_a.noconvert(), "encoder"_a, "Fill values.");
  module.def("choose_scales", &choose_scales<Element>, "bits"_a.noconvert(), "dtype"_a, "int4"_a,
             "group"_a, "scales"_a.noconvert(), "encoder"_a,
             "Fill scales. Returns whether all weights are finite.");
  module.def("level_structure", &level_structure<Element>, "bits"_a.noconvert(), "dtype"_a,
             "int4"_a, "group"_a, "scales"_a.noconvert(), "bitmap"_a.noconvert().none(),
             "offsets"_a.noconvert(), "encoder"_a,
             "Fill bitmap and offsets. Returns the units of values.");
  module.def("level_values", &level_values<Element>, "bits"_a.noconvert(), "dtype"_a, "int4"_a,
             "group"_a, "scales"_a.noconvert(), "bitmap"_a.noconvert().none(),
             "offsets"_a.noconvert(), "values"_a.noconvert(), "encoder"_a, "Fill values.");
  module.def("prune", &prune<Element>, "bits"_a.noconvert(), "infinity"_a, "wanted"_a,
             "Set the `wanted` elements of smallest magnitude to +0.0.");
}

}  // namespace
}  // namespace encode
}  // namespace tierd

NB_MODULE(_encode, module) {
  module.doc() = "The native encoder; tierd_kernels.encode is the interface.";
  module.attr("INTERFACE") = tierd::kInterface;
  module.def("encoder_names", &tierd::encode::encoder_names,
             nb::sig("def encoder_names() -> tuple[tuple[str, bool], ...]"),
             "(name, whether this processor can run it) of every encoder built, slowest first.");
  tierd::encode::bind<uint16_t>(module);
  tierd::encode::bind<uint32_t>(module);
}
