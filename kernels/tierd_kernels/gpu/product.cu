// x @ W.T from an exponent-packed W, or one of int8: as multiply_tiles of product.py, with work shared that Triton
// cannot share. Compiled by NVRTC when it is first launched, so no header is included.
//
// A warp has a whole tile, so nobody waits for another warp. First it decodes the record in the
// record's order, 16 elements a lane: what is not kept costs nothing. The low and the high bytes of
// the elements become two streams in its shared memory. Then each lane takes the octets that it
// needs for the tensor cores out of both: windows of 8 bytes from the octet's rank on, spread to
// their columns. Lane (g, t), 4 g + t, has rows g and g + 8 of 16 and columns 8 t to 8 t + 7 of 32;
// x follows, so the order of the additions within a tile is not that of the columns.
//
// Contents are hostile: decode.py says what is compared before anything is followed.
//
// Masked matrices only: where all is kept, Triton has less to do. And of 4 planes at most.
//
// The elements of int8 are bytes already: one stream, as the record is.
//
// Defined by who compiles: INT8, 0 or 1; PLANES, 0 to 4, of int8 0; F16, 0 or 1; TOKENS, 16, 32 or 64.

using u32 = unsigned int;
using u64 = unsigned long long;
using byte = unsigned char;

namespace {

constexpr u32 WARPS = 4;
constexpr u32 ALL = 0xFFFFFFFFu;
constexpr u32 BLOCK = 512;  // elements that a warp decodes at once
constexpr u32 MOST_BLOCKS = 4096 / BLOCK;
constexpr u32 AHEAD = TOKENS < 64 && PLANES < 4 ? 4 : 2;  // blocks read before one is decoded
constexpr bool X_FIRST = TOKENS == 16;  // x is read before the record, not behind it
constexpr bool FRONT_AHEAD = TOKENS < 64;  // what is before the next record, beside this product
constexpr u32 STREAM_BYTES = 4096 + 16;  // a window ends up to 11 bytes after its element
constexpr u32 TOKEN_TILES = TOKENS / 8;
constexpr bool LEVELS = INT8;
constexpr u32 NO_FAULT = ALL;

// Numbers of REASONS in faults.py.
enum Reason : u32 { BITS, HEAD, OFFSETS, ESCAPES, NONE };

// What a warp has of a tile beside its registers.
struct Tile {
    uint4 low[STREAM_BYTES / 16];   // of each kept element, in the record's order: its low byte
    uint4 high[LEVELS ? 1 : STREAM_BYTES / 16];
    uint4 halves[64];  // of each row: bits of columns 0 to 31, rank of the first; then 32 to 63
};

struct Matrix {
    const byte *bitmap, *offsets, *heads, *values;  // heads: of exponent-packed
    u32 most_units;  // of 16 bytes, in values
    u32 most_escapes;
    u32 tiles;
};

// What is read of a tile before its record.
struct Front {
    uint4 bits;  // of rows 2 lane and 2 lane + 1
    u32 begin, end, head;
};

// Where in its record a tile has what, and how much of it. Nothing, where something is wrong.
struct Record {
    const byte *at;
    u32 count, planes_at, plane_bytes, planes, base, escapes_at, escapes;
};

// 16 elements of a lane as the record has them.
struct Block {
    uint4 bytes;
    u32 bits[PLANES ? PLANES : 1];
};

// Where a lane reads its first block. A plane that the record has not is read where there is
// something to read, and not in `codes`, the bits of each byte that are.
struct Source {
    const byte *bytes, *bits[PLANES ? PLANES : 1];
    u32 element, count, codes;
};

__device__ __forceinline__ u32 permuted(u32 low, u32 high, u32 selector) {
    u32 found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(low), "r"(high), "r"(selector));
    return found;
}

// An address that the compiler computes where it stands, once: not all of them at first, nor anew
// wherever it is used.
template <class Item>
__device__ __forceinline__ const Item *fixed(const Item *at) {
    asm volatile("" : "+l"(at));
    return at;
}

// Written as logic, these would be two instructions.
template <u32 MASK>
__device__ __forceinline__ u32 selected(u32 where_set, u32 elsewhere) {
    u32 found;
    asm("lop3.b32 %0, %1, %2, %3, 0xE2;" : "=r"(found) : "r"(where_set), "n"(MASK), "r"(elsewhere));
    return found;
}

// Bits of the half row that begins at column `left`, of a tile `width` columns wide.
__device__ __forceinline__ u32 bits_inside(u32 left, u32 width) {
    return width >= left + 32 ? ALL : width <= left ? 0 : (1u << (width - left)) - 1;
}

__device__ __forceinline__ uint4 allowed(u32 lane, u32 height, u32 width) {
    u32 first = bits_inside(0, width), second = bits_inside(32, width);
    u32 above = 2 * lane < height ? ALL : 0, below = 2 * lane + 1 < height ? ALL : 0;
    return make_uint4(first & above, second & above, first & below, second & below);
}

__device__ __forceinline__ Front front(const Matrix &matrix, u32 tile, u32 lane) {
    Front found;
    found.bits = __ldg(reinterpret_cast<const uint4 *>(matrix.bitmap) + u64(tile) * 32 + lane);
    const u32 *offset = reinterpret_cast<const u32 *>(matrix.offsets) + tile;
    found.begin = __ldg(offset);
    found.end = __ldg(offset + 1);
    found.head = LEVELS ? 0 : __ldg(reinterpret_cast<const u32 *>(matrix.heads) + tile);
    return found;
}

// Whether the elements of the escapes do not ascend strictly below `count`, or a pad is not 0.
__device__ __forceinline__ bool escapes_are_wrong(const u32 *escape, u32 escapes, u32 count, u32 lane) {
    bool wrong = false;
#pragma unroll 1
    for (u32 index = lane; index < escapes; index += 32) {
        u32 here = __ldg(escape + index);
        u32 limit = index + 1 < escapes ? __ldg(escape + index + 1) & 0xFFFF : count;
        wrong |= (here & 0xFFFF) >= limit || here >> 24 != 0;
    }
    return __any_sync(ALL, wrong);
}

// Compares all that leads anywhere. `outside`: of any lane, a bit outside the matrix is set.
__device__ __forceinline__ Reason checked(
    const Matrix &matrix, const Front &front, u32 tile, bool outside, u32 lane, Record &record) {
    u32 count = record.count, head = front.head;
    record.base = head & 0xFF;
    record.planes = head >> 8 & 0xFF;
    record.escapes = head >> 16;
    record.planes_at = (count + 7) & ~7u;
    record.plane_bytes = (count + 63) / 64 * 8;
    record.escapes_at = record.planes_at + record.planes * record.plane_bytes;
    record.at = matrix.values + u64(front.begin) * 16;
    u32 most = min(count, matrix.most_escapes);
    bool can_be = record.planes <= PLANES && record.escapes <= most &&
                  record.base + (1u << min(record.planes, 8u)) <= 256 && (count || !head);
    if (LEVELS) record.escapes_at = count;
    u32 needed = record.escapes_at + 4 * record.escapes;
    bool fits = front.begin <= front.end && front.end <= matrix.most_units &&
                front.end - front.begin == (needed + 15) / 16 && (tile || !front.begin) &&
                (tile + 1 != matrix.tiles || front.end == matrix.most_units);
    Reason reason = NONE;
    if (outside || !can_be || !fits) {
        reason = outside ? BITS : !can_be ? HEAD : OFFSETS;
    } else if (record.escapes) {
        const u32 *escape = reinterpret_cast<const u32 *>(record.at + record.escapes_at);
        if (escapes_are_wrong(escape, record.escapes, count, lane)) reason = ESCAPES;
    }
    return reason;
}

// The ranks of the lane's rows, left for all lanes; what is wrong with the tile: it is empty then.
__device__ __forceinline__ Reason begun(
    const Matrix &matrix, const Front &front, u32 tile, u32 height, u32 width, u32 lane,
    Tile &shared, Record &record) {
    uint4 bits = front.bits;
    bool outside = false;
    if (height < 64 || width < 64) {
        uint4 may = allowed(lane, height, width);
        outside = bits.x & ~may.x || bits.y & ~may.y || bits.z & ~may.z || bits.w & ~may.w;
        outside = __any_sync(ALL, outside);
    }
    u32 first = __popc(bits.x), second = first + __popc(bits.y);
    u32 third = second + __popc(bits.z), ones = third + __popc(bits.w), through = ones;
#pragma unroll
    for (u32 apart = 1; apart < 32; apart *= 2) {
        u32 before = __shfl_up_sync(ALL, through, apart);
        if (lane >= apart) through += before;
    }
    record.count = __shfl_sync(ALL, through, 31);
    Reason reason = checked(matrix, front, tile, outside, lane, record);
    u32 rank = through - ones;
    uint4 *halves = shared.halves + 2 * lane;
    halves[0] = make_uint4(bits.x, rank, bits.y, rank + first);
    halves[1] = make_uint4(bits.z, rank + second, bits.w, rank + third);
    if (reason != NONE) {
        halves[0] = halves[1] = make_uint4(0, 0, 0, 0);
        record.count = record.escapes = 0;
    }
    return reason;
}

__device__ __forceinline__ Source source(const Record &record, u32 lane) {
    Source found;
    found.element = lane * 16;
    found.count = record.count;
    found.codes = ((1u << record.planes) - 1) * 0x01010101;
    found.bytes = fixed(record.at + lane * 16);
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
        u32 from = u32(plane) < record.planes ? record.planes_at + plane * record.plane_bytes : 0;
        found.bits[plane] = fixed(record.at + (from + lane * 2));
    }
    return found;
}

// Reads block `number` of the record, if the lane has elements in it. All that is read lies in the
// record: its planes are filled up to 8 bytes, and itself to 16.
__device__ __forceinline__ void read(const Source &source, u32 number, Block &block) {
    if (source.element + number * BLOCK >= source.count) return;
    block.bytes = __ldg(reinterpret_cast<const uint4 *>(source.bytes + number * BLOCK));
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++)
        block.bits[plane] = __ldg(
            reinterpret_cast<const unsigned short *>(source.bits[plane] + number * (BLOCK / 8)));
}

// Of 16 elements in 4 planes, the codes: nibbles 2 i of `first` are those of elements 0 to 3,
// nibbles 2 i + 1 those of 4 to 7; of `last`, 8 to 11 and 12 to 15.
__device__ __forceinline__ void codes(u32 p0, u32 p1, u32 p2, u32 p3, u32 &first, u32 &last) {
    u32 even_planes = p0 | p2 << 16, odd_planes = p1 | p3 << 16;
    u32 even = selected<0xAAAAAAAA>(odd_planes << 1, even_planes);
    u32 odd = selected<0xAAAAAAAA>(odd_planes, even_planes >> 1);
    u32 low = permuted(even, odd, 0x5410), high = permuted(even, odd, 0x7632);
    u32 some = selected<0xCCCCCCCC>(high << 2, low);  // elements 4 i; 4 i + 1 in the upper half
    u32 others = selected<0xCCCCCCCC>(high, low >> 2);
    first = permuted(some, others, 0x6420);
    last = permuted(some, others, 0x7531);
}

// The low and high bytes of 16 elements: the record has them rotated left by one bit.
__device__ __forceinline__ void decode(
    const Block &block, const Source &source, u32 base, uint4 &low, uint4 &high) {
    u32 bits[4], first, last;
#pragma unroll
    for (int plane = 0; plane < 4; plane++)
        bits[plane] = plane < PLANES ? block.bits[plane] : 0;
    codes(bits[0], bits[1], bits[2], bits[3], first, last);
    const u32 mask = source.codes;
    u32 top[4] = {first & mask, first >> 4 & mask, last & mask, last >> 4 & mask};
    u32 bytes[4] = {block.bytes.x, block.bytes.y, block.bytes.z, block.bytes.w}, lows[4], highs[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        top[i] += base;  // of 4 bytes, none of which passes 255
        lows[i] = selected<0x80808080>(top[i] << 7, bytes[i] >> 1);
        highs[i] = selected<0x80808080>(bytes[i] << 7, top[i] >> 1);
    }
    low = make_uint4(lows[0], lows[1], lows[2], lows[3]);
    high = make_uint4(highs[0], highs[1], highs[2], highs[3]);
}

// What the escapes say of their elements: each has one of its own.
__device__ __forceinline__ void put_escapes(const u32 *escape, u32 escapes, u32 lane, Tile &shared) {
    byte *low = reinterpret_cast<byte *>(shared.low), *high = reinterpret_cast<byte *>(shared.high);
#pragma unroll 1
    for (u32 index = lane; index < escapes; index += 32) {
        u32 said = __ldg(escape + index), element = said & 0xFFFF, top = said >> 16;
        low[element] = low[element] & 0x7F | (top & 1) << 7;
        high[element] = high[element] & 0x80 | top >> 1;
    }
}

__device__ __forceinline__ void streamed(const Record &record, u32 lane, Tile &shared) {
    u32 blocks = (record.count + BLOCK - 1) / BLOCK, base = record.base * 0x01010101;
    Source from = source(record, lane);
    Block block[AHEAD] = {};
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) read(from, i, block[i]);
#pragma unroll
    for (u32 first = 0; first < MOST_BLOCKS; first += AHEAD)
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            if (first + i >= blocks) goto decoded;
            u32 place = (first + i) * (BLOCK / 16) + lane;
            if (LEVELS) {
                shared.low[place] = block[i].bytes;
            } else {
                decode(block[i], from, base, shared.low[place], shared.high[place]);
            }
            if (first + i + AHEAD < MOST_BLOCKS) read(from, first + i + AHEAD, block[i]);
        }
decoded:
    __syncwarp();
    if (record.escapes) {
        const u32 *escape = reinterpret_cast<const u32 *>(record.at + record.escapes_at);
        put_escapes(escape, record.escapes, lane, shared);
        __syncwarp();
    }
}

// Bit j of four as byte j.
__device__ __forceinline__ u32 bytes_of_bits(u32 bits) { return bits * 0x00204081 & 0x01010101; }

// Digit j of base 16: how many columns are kept before j, and 4 more if it is not itself.
__device__ __forceinline__ u32 selector(u32 ones) {
    return __dp2a_hi(0xC0000C00u, ones, __dp2a_lo(0x10C0110Cu, ones, 0x4444u));
}

// 8 bytes from byte `at` of a stream on.
__device__ __forceinline__ uint2 window(const uint4 *stream, u32 at) {
    const u32 *word = reinterpret_cast<const u32 *>(stream) + at / 4;
    u32 first = word[0], second = word[1], third = word[2], shift = at * 8;
    return make_uint2(__funnelshift_r(first, second, shift), __funnelshift_r(second, third, shift));
}

// Four levels as numbers, two in each word. 7 bits of a byte become the end of a mantissa, and what
// that adds goes; the last bit, which counts -128, goes with it.
__device__ __forceinline__ void numbers_of(u32 levels, u32 words[2]) {
    const u32 exponent = F16 ? 0x64646464 : 0x43434343;
    u32 positive = levels & 0x7F7F7F7F, negative = levels & 0x80808080;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        u32 which = i ? 0x4342 : 0x4140;
        u32 number = permuted(positive, exponent, which), more = permuted(negative, exponent, which);
#if F16
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(words[i]) : "r"(number), "r"(more));
#else
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(words[i]) : "r"(more), "r"(0xBF80BF80u), "r"(number));
#endif
    }
}

// Columns 8 t to 8 t + 7 of a half row, two in each word.
__device__ __forceinline__ void octet(
    const Tile &shared, u32 row, u32 half, u32 t, u32 before, u32 words[4]) {
    uint2 found = reinterpret_cast<const uint2 *>(shared.halves)[2 * row + half];
    u32 rank = found.y + __popc(found.x & before);
    u32 kept = permuted(found.x, 0, 0x4440 | t);
    u32 ones = bytes_of_bits(kept & 15), later = bytes_of_bits(kept >> 4);
    u32 select = selector(ones), select_later = selector(later);
    u32 bits = __dp4a(ones, 0x08080808u, 0u);  // of the bytes that columns 0 to 3 take
    uint2 low = window(shared.low, rank);
    u32 lows = permuted(low.x, 0, select);
    u32 lows_later = permuted(__funnelshift_rc(low.x, low.y, bits), 0, select_later);
    if constexpr (LEVELS) {
        numbers_of(lows, words);
        numbers_of(lows_later, words + 2);
    } else {
        uint2 high = window(shared.high, rank);
        u32 highs = permuted(high.x, 0, select);
        u32 highs_later = permuted(__funnelshift_rc(high.x, high.y, bits), 0, select_later);
        words[0] = permuted(lows, highs, 0x5140);
        words[1] = permuted(lows, highs, 0x7362);
        words[2] = permuted(lows_later, highs_later, 0x5140);
        words[3] = permuted(lows_later, highs_later, 0x7362);
    }
}

__device__ __forceinline__ void multiply(
    float sums[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if F16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct X {
    const unsigned short *at;  // the lane's columns of tile 0, of the first token
    u64 stride;
    u32 cols;
    u32 first_token, last_token;  // of the lane; of all
    bool aligned;  // every row, to 16 bytes
};

// Two neighbours, of which `left` are in the matrix; 0 where none is.
__device__ __forceinline__ u32 two_of(const unsigned short *at, int left) {
    u32 first = left > 0 ? __ldg(at) : 0;
    return first | (left > 1 ? u32(__ldg(at + 1)) << 16 : 0);
}

// Of each token of the lane, its 8 columns of both halves of a tile. A token that is not there is
// the last one again: nobody looks at its sums.
__device__ __forceinline__ void read_x(
    const X &x, u32 tile_col, u32 lane, uint4 (&found)[TOKEN_TILES][2]) {
    u32 width = x.cols - tile_col * 64;
    const unsigned short *column = x.at + tile_col * 64ull;
    if (x.aligned && width >= 64) {
#pragma unroll
        for (u32 j = 0; j < TOKEN_TILES; j++) {
            auto at = column + min(x.first_token + 8 * j, x.last_token) * x.stride;
            found[j][0] = __ldg(reinterpret_cast<const uint4 *>(at));
            found[j][1] = __ldg(reinterpret_cast<const uint4 *>(at + 32));
        }
        return;
    }
#pragma unroll
    for (u32 j = 0; j < TOKEN_TILES; j++)
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            auto at = fixed(
                column + min(x.first_token + 8 * j, x.last_token) * x.stride + half * 32);
            int left = int(min(width, 64u)) - int(half * 32 + lane % 4 * 8);
            found[j][half] = make_uint4(
                two_of(at, left), two_of(at + 2, left - 2), two_of(at + 4, left - 4),
                two_of(at + 6, left - 6));
        }
}

using Sums = float[4][TOKEN_TILES][4];

// Of int8: the scales of the lane's rows, of row 16 i + g in the lower half, of the 8th after it in
// the upper one. What is read next is for the tiles from `end` on.
struct Scales {
    const unsigned short *at;
    u32 end, rows[4];
};

__device__ __forceinline__ Scales scales_of(
    const byte *scales, u32 tile_row, u32 tile_cols, u32 group_tiles, u32 first, u32 lane) {
    u64 groups = (u64(tile_cols) + group_tiles - 1) / group_tiles;
    u64 group = tile_row * groups + first / group_tiles;
    return {reinterpret_cast<const unsigned short *>(scales) + group * 64 + lane / 4, first, {}};
}

__device__ __forceinline__ void read_scales(
    Scales &scales, u32 tile_col, u32 tile_cols, u32 group_tiles) {
    if (tile_col != scales.end) return;
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        scales.rows[i] = __ldg(scales.at + 16 * i) | u32(__ldg(scales.at + 16 * i + 8)) << 16;
    scales.at += 64;
    scales.end += min(group_tiles - tile_col % group_tiles, tile_cols - tile_col);
}

// Adds a tile times x. Tensor cores cut off: each tile's sums are added as float32, outside of them.
__device__ __forceinline__ void add_product(
    const Tile &shared, const uint4 (&x)[TOKEN_TILES][2], const Scales &scales, u32 lane,
    Sums &sums) {
    const u32 g = lane / 4, t = lane % 4, before = (1u << 8 * t) - 1;
#pragma unroll
    for (u32 tall = 0; tall < 4; tall++) {
        u32 above[2][4], below[2][4];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            octet(shared, 16 * tall + g, half, t, before, above[half]);
            octet(shared, 16 * tall + g + 8, half, t, before, below[half]);
        }
        const float above_scale = __uint_as_float(scales.rows[tall] << 16);
        const float below_scale = __uint_as_float(scales.rows[tall] & 0xFFFF0000);
#pragma unroll
        for (u32 j = 0; j < TOKEN_TILES; j++) {
            float found[4] = {};
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 *a = above[half], *b = below[half];
                multiply(found, a[0], b[0], a[1], b[1], x[j][half].x, x[j][half].y);
                multiply(found, a[2], b[2], a[3], b[3], x[j][half].z, x[j][half].w);
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                float &sum = sums[tall][j][i];
                sum = LEVELS ? fmaf(found[i], i < 2 ? above_scale : below_scale, sum) : sum + found[i];
            }
        }
    }
}

// The sums of all warps, added in their order; the last warp has them.
__device__ __forceinline__ void add_warps(float *room, u32 warp, u32 lane, Sums &sums) {
    for (u32 turn = 0; turn < WARPS; turn++) {
        __syncthreads();
        if (warp != turn) continue;
#pragma unroll
        for (u32 i = 0; i < 16 * TOKEN_TILES; i++) {
            float &sum = sums[i / (4 * TOKEN_TILES)][i / 4 % TOKEN_TILES][i % 4];
            if (turn) sum = room[32 * i + lane] + sum;
            room[32 * i + lane] = sum;
        }
    }
}

}  // namespace

// Programs: [tile rows, splits, blocks of TOKENS tokens], of 128 threads. Arguments: as those of
// multiply_tiles; bitmap, values: aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(32 * WARPS, TOKENS == 16 ? 4 : 2) multiply_packed(
    const byte *bitmap, const byte *offsets, const byte *heads, const byte *scales_at,
    const byte *values, const unsigned short *x_at, float *parts, long long *faults, u64 values_bytes,
    u32 most_escapes, u32 rows, u32 cols, u32 tokens, u64 x_stride, u32 group_tiles, u32 splits) {
    __shared__ Tile shared[WARPS];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 tile_row = blockIdx.x, split = blockIdx.y;
    const u32 tile_cols = (u64(cols) + 63) / 64, tile_rows = (u64(rows) + 63) / 64;
    const Matrix matrix = {bitmap,       offsets,
                           heads,        values,
                           u32(values_bytes / 16), most_escapes,
                           u32(u64(tile_rows) * tile_cols)};
    const X x = {x_at + lane % 4 * 8, x_stride, cols, blockIdx.z * TOKENS + lane / 4, tokens - 1,
                 (reinterpret_cast<u64>(x_at) | x_stride * 2) % 16 == 0};
    const u64 parted = u64(split) * WARPS + warp, parting = u64(splits) * WARPS;
    const u32 first = parted * tile_cols / parting, end = (parted + 1) * tile_cols / parting;
    const u32 first_tile = tile_row * tile_cols;
    const u32 height = min(rows - tile_row * 64, 64u);

    Tile &mine = shared[warp];
    for (u32 i = lane; i < STREAM_BYTES / 16; i += 32) {
        mine.low[i] = make_uint4(0, 0, 0, 0);
        if (!LEVELS) mine.high[i] = make_uint4(0, 0, 0, 0);
    }
    Sums sums = {};
    Scales scales = {};
    if (LEVELS) scales = scales_of(scales_at, tile_row, tile_cols, group_tiles, first, lane);
    u32 fault = NO_FAULT;
    Front following = {};
    if (FRONT_AHEAD && first < end) following = front(matrix, first_tile + first, lane);
    for (u32 tile_col = first; tile_col < end; tile_col++) {
        Front present = FRONT_AHEAD ? following : front(matrix, first_tile + tile_col, lane);
        u32 width = min(cols - tile_col * 64, 64u);
        Record record;
        __syncwarp();  // the tile before is no longer read
        Reason reason = begun(matrix, present, first_tile + tile_col, height, width, lane, mine, record);
        if (reason != NONE) fault = min(fault, tile_col * NONE + reason);
        uint4 turned[TOKEN_TILES][2];
        if (X_FIRST) read_x(x, tile_col, lane, turned);
        streamed(record, lane, mine);
        if (!X_FIRST) read_x(x, tile_col, lane, turned);
        if (FRONT_AHEAD && tile_col + 1 < end)
            following = front(matrix, first_tile + tile_col + 1, lane);
        if constexpr (LEVELS) read_scales(scales, tile_col, tile_cols, group_tiles);
        add_product(mine, turned, scales, lane, sums);
    }
    if (fault != NO_FAULT && lane == 0)
        atomicMin(faults, static_cast<long long>(u64(first_tile) * NONE + fault));

    add_warps(reinterpret_cast<float *>(shared), warp, lane, sums);
    if (warp != WARPS - 1) return;
    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 16 * TOKEN_TILES; i++) {
        u32 tall = i / (4 * TOKEN_TILES), j = i / 4 % TOKEN_TILES;
        u32 row = 16 * tall + g + i % 4 / 2 * 8;
        u32 token = blockIdx.z * TOKENS + 8 * j + 2 * t + i % 2;
        if (row < height && token < tokens)
            parts[(u64(split) * tokens + token) * rows + u64(tile_row) * 64 + row] =
                sums[tall][j][i % 4];
    }
}
