// csrc/cuda/device.h for a CPU: a block's threads are fibers, and a warp's lanes meet at every instruction that lets them see
// each other's registers. What it checks beside the numbers:
//   - lanes of a warp that reach different instructions, or warps that reach different barriers: the launch ends with a message;
//   - a missing barrier: warps run one after the other between barriers, in an order that changes with PTV2_EMULATE_ORDER;
//   - cp.async used before it was waited for, or into memory still being read: copies land as late as the program allows, or at
//     once with PTV2_EMULATE_EAGER=1; tests do both;
//   - shared memory read before it was written: it starts full of NaN;
//   - wgmma: its operands by the rules of its descriptors, its sums as late as the program allows, and a copy it reads that no
//     fence has published to it.
// It does not model time, bank conflicts, or races between the lanes of one warp inside an instruction.
#pragma once

#include "fibers.h"

#define PTV2_DEVICE inline
#define PTV2_KERNEL(threads, blocks) void

namespace ptv2::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

namespace emulator {

inline float to_float(Bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Fp16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
template <class E>
float element(uint32_t packed, int which) { return to_float(E{static_cast<uint16_t>(packed >> 16 * which)}); }
inline uint16_t rounded(float x, Bf16) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t rounded(float x, Fp16) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

inline void check_shared(const void* p, int bytes, int alignment) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < block.shared || at + bytes > block.shared + MAX_SHARED) fail("an address outside shared memory");
  if (reinterpret_cast<uintptr_t>(p) % alignment) fail("a shared address that is not aligned");
}

inline void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, 16);
  const int piece = static_cast<int>(static_cast<unsigned char*>(copy.to) - block.shared) / 16;
  if (block.unpublished[piece] == block.running + 1) return;
  block.unpublished[piece] = static_cast<short>(block.running + 1);
  here().unpublished.push_back(piece);
}

inline void matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  check_shared(row, 16, 16);
  const Meeting all = meet(transposed ? "ldmatrix.trans" : "ldmatrix", {reinterpret_cast<uint64_t>(row)});
  const int g = block.running % 32 / 4, t = block.running % 4;
  for (int m = 0; m < 4; ++m) {
    auto at = [&](int i, int j) { return reinterpret_cast<const uint16_t*>(all.given(m * 8 + i).word[0])[j]; };
    const uint16_t low = transposed ? at(2 * t, g) : at(g, 2 * t), high = transposed ? at(2 * t + 1, g) : at(g, 2 * t + 1);
    r[m] = low | static_cast<uint32_t>(high) << 16;
  }
}

}  // namespace emulator

inline unsigned char* shared_memory() { return emulator::block.shared; }
inline int thread() { return emulator::block.running; }
inline int lane() { return emulator::block.running % 32; }
inline int warp() { return emulator::block.running / 32; }
inline int num_threads() { return emulator::block.threads; }
inline int block_x() { return emulator::block.index.x; }
inline int block_y() { return emulator::block.index.y; }

inline void sync() { emulator::stop_at(emulator::BARRIER); }
inline void sync_warp() { emulator::meet("syncwarp", {}); }
template <class X>
X shuffle(X x, int from) {
  static_assert(sizeof(X) == 4);
  return std::bit_cast<X>(static_cast<uint32_t>(emulator::meet("shfl", {std::bit_cast<uint32_t>(x)}).given(from & 31).word[0]));
}
template <class X>
X shuffle_xor(X x, int mask) { return shuffle(x, lane() ^ mask); }
inline uint32_t ballot(bool x) {
  const emulator::Meeting all = emulator::meet("ballot", {x});
  uint32_t bits = 0;
  for (int l = 0; l < 32; ++l) bits |= static_cast<uint32_t>(all.given(l).word[0]) << l;
  return bits;
}

inline void copy16(void* to, const void* from, bool valid) {
  emulator::check_shared(to, 16, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("cp.async from an address that is not aligned");
  static const unsigned char zeros[16] = {};
  const void* source = valid ? from : zeros;
  if (emulator::block.eager) emulator::land({to, source});
  else emulator::here().groups.back().push_back({to, source});
}
inline void commit() { emulator::here().groups.emplace_back(); }
template <int N>
void wait() {
  auto& groups = emulator::here().groups;  // the last one is not committed yet
  while (static_cast<int>(groups.size()) - 1 > N) {
    for (const auto& copy : groups.front()) emulator::land(copy);
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulator::matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulator::matrices(r, row, true); }

template <class E>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using emulator::element;
  auto two = [](uint32_t x, uint32_t y) { return x | static_cast<uint64_t>(y) << 32; };
  const emulator::Meeting all = emulator::meet("mma", {two(a[0], a[1]), two(a[2], a[3]), two(b0, b1)});
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * t + i % 2;  // a half of the rows; a column
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const emulator::Registers &left = all.given(g * 4 + k % 8 / 2), &right = all.given(column * 4 + k % 8 / 2);
      const auto pair = static_cast<uint32_t>(left.word[k / 8] >> 32 * row);
      sum += element<E>(pair, k % 2) * element<E>(static_cast<uint32_t>(right.word[2] >> 32 * (k / 8)), k % 2);
    }
    d[i] += sum;
  }
}

template <class E>
uint32_t pack(float low, float high) {
  return emulator::rounded(low, E{}) | static_cast<uint32_t>(emulator::rounded(high, E{})) << 16;
}
template <class E>
void unpack(uint32_t packed, float& low, float& high) {
  low = emulator::element<E>(packed, 0), high = emulator::element<E>(packed, 1);
}
inline float power_of_2(float x) { return std::exp2(x); }
inline float logarithm_2(float x) { return std::log2(x); }

inline uint32_t shared_address(const void* p) {
  emulator::check_shared(p, 16, 16);
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::block.shared);
}
inline void publish() {
  for (int piece : emulator::here().unpublished)
    if (short& owner = emulator::block.unpublished[piece]; owner == emulator::block.running + 1) owner = 0;
  emulator::here().unpublished.clear();
}
inline void group_begin() { emulator::here().may_multiply = true; }

template <class E, int TRANSPOSED, int COLUMNS>
void group_multiply(float (&d)[COLUMNS][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  using emulator::element;
  if (!emulator::here().may_multiply) emulator::fail("wgmma without a fence before it");
  if (b >> 62 != 1) emulator::fail("a descriptor of another layout");
  auto two = [](uint32_t x, uint32_t y) { return x | static_cast<uint64_t>(y) << 32; };
  const emulator::Meeting all = emulator::meet("wgmma", {two(a[0], a[1]), two(a[2], a[3]), b});
  auto widen = [](uint16_t bits) { return emulator::to_float(E{bits}); };
  emulator::Product product{&d[0][0], COLUMNS * 8, TRANSPOSED != 0, add, {}, b, widen};
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      const emulator::Registers& from = all.given(lane() / 4 * 4 + k % 8 / 2);
      if (from.word[2] != b) emulator::fail("lanes with different descriptors");
      product.left[half][k] = element<E>(static_cast<uint32_t>(from.word[k / 8] >> 32 * half), k % 2);
    }
  emulator::here().products.push_back(product);  // the right factor and the sums wait for group_end
}

// Byte of element (k, n) of a right factor, by the canonical layouts of a descriptor with 128-byte swizzle.
inline int right_byte(const emulator::Product& p, int k, int n) {
  const int start = (p.right & 0x3FFF) << 4, panel = (p.right >> 16 & 0x3FFF) << 4, group = (p.right >> 32 & 0x3FFF) << 4;
  const int lies = p.transposed ? n % 64 * 2 + n / 64 * panel + k % 8 * 128 + k / 8 * group : n / 8 * group + n % 8 * 128 + k * 2;
  return (start + lies) ^ ((start + lies) >> 7 & 7) << 4;
}

inline void group_end() {
  for (const emulator::Product& p : emulator::here().products)
    for (int n = 0; n < p.columns; ++n) {
      if (n % 8 / 2 != lane() % 4) continue;
      for (int half = 0; half < 2 && !p.add; ++half) p.sums[n / 8 * 4 + half * 2 + n % 2] = 0;
      for (int k = 0; k < 16; ++k) {
        const int byte = right_byte(p, k, n);
        if (byte >= emulator::MAX_SHARED) emulator::fail("a descriptor outside shared memory");
        if (emulator::block.unpublished[byte / 16]) emulator::fail("wgmma reads a copy that was not published");
        uint16_t bits;
        std::memcpy(&bits, emulator::block.shared + byte, 2);
        for (int half = 0; half < 2; ++half) p.sums[n / 8 * 4 + half * 2 + n % 2] += p.left[half][k] * p.to_float(bits);
      }
    }
  emulator::here().products.clear(), emulator::here().may_multiply = false;
}

constexpr int SUCCESS = 0, INVALID_VALUE = 1, FAILED = 2;

template <class Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, void*, const Arguments& arguments) {
  if (threads % 32 || threads > 1024 || shared_bytes > emulator::MAX_SHARED) return INVALID_VALUE;
  emulator::block.failure[0] = 0;
  emulator::block.grid = grid, emulator::block.threads = threads;
  emulator::block.body = [kernel, &arguments] { kernel(arguments); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        emulator::block.index = {x, y, z};
        if (!emulator::run_block(threads)) return FAILED;
      }
  return SUCCESS;
}

}  // namespace ptv2::cuda
