// The rows of a table that n-grams are hashed to, a block of tokens at a time: their mixes, then head
// by head the remainders. A division by a size that stays the same is a product.
//
// Shapes: B sequences, L tokens known of each, the last S of which are addressed, O orders of
// n-grams (2, 3, …), P heads of each, H = O P.

#include "memory.h"

namespace moezoo {
namespace {

constexpr int64_t kMostOrders = 8;
constexpr int64_t kBlock = 128;            // tokens, whose rows stay in the nearest cache
constexpr int64_t kLeastTokens = 1 << 11;  // that are worth a thread
constexpr int64_t kFresh = 1 << 18;        // bytes of rows from which pages are asked for
constexpr int64_t kStreamed = 8 << 20;     // and from which they are written past the caches

// Numbers below 2^63 modulo the size of a head, one at a time. With m = ⌊(2^64 - 1) / size⌋ the
// quotient ⌊x m / 2^64⌋ is the right one or one less, since x / size - x m / 2^64 < 1 / 2.
class OneByOne {
 public:
  using Value = uint64_t;
  static constexpr int64_t kWidth = 1;

  OneByOne(const int64_t* sizes, const int64_t* offsets, int64_t heads, int64_t) {
    for (int64_t h = 0; h < heads; ++h) {
      const uint64_t size = static_cast<uint64_t>(sizes[h]);
      heads_.push_back({size, static_cast<uint64_t>(offsets[h]), ~uint64_t{0} / size});
    }
  }

  static Value all(uint64_t x) { return x; }

  // For the tokens t < count: rows[t * stride] = number(t, remainder), which takes remainders of
  // the head `at`.
  template <class Number>
  void fill(int64_t at, int64_t, int64_t count, int64_t stride, int64_t* rows,
            bool, const Number& number) const {
    const Head head = heads_[at];
    const auto remainder = [&](Value x) {
      const uint64_t quotient =
          static_cast<uint64_t>((static_cast<unsigned __int128>(x) * head.reciprocal) >> 64);
      const uint64_t rest = x - quotient * head.size;
      return std::min(rest, rest - head.size);  // which of them it is cannot be predicted
    };
    for (int64_t t = 0; t < count; ++t)
      rows[t * stride] = static_cast<int64_t>(number(t, remainder) + head.offset);
  }

 private:
  struct Head {
    uint64_t size, offset, reciprocal;
  };
  std::vector<Head> heads_;
};

#if defined(__AVX512DQ__)
// The same for the heads of an order side by side, by doubles, of which the quotient has at most 50
// bits for sizes from 2^13 on. Three roundings and a reciprocal that is 2^-51 too small leave it
// less than 7 2^10 / size < 1 below x / size, and never above: it is the right one or one less.
class SideBySide {
 public:
  typedef uint64_t Value __attribute__((vector_size(64)));
  typedef int64_t Signed __attribute__((vector_size(64)));
  typedef double Doubles __attribute__((vector_size(64)));
  static constexpr int64_t kWidth = 8;
  static constexpr int64_t kLeastSize = 1 << 13;

  SideBySide(const int64_t* sizes, const int64_t* offsets, int64_t heads, int64_t per_order) {
    for (int64_t order = 0; order < heads / per_order; ++order)
      for (int64_t first = 0; first < per_order; first += kWidth) {
        Heads found{};
        for (int64_t i = 0; i < kWidth; ++i) {
          // Lanes behind the last head repeat it, and are not stored.
          const int64_t head = order * per_order + std::min(first + i, per_order - 1);
          found.size[i] = static_cast<uint64_t>(sizes[head]);
          found.offset[i] = static_cast<uint64_t>(offsets[head]);
          found.inverse[i] = 1.0 / static_cast<double>(sizes[head]) * (1.0 - 0x1p-51);
        }
        heads_.push_back(found);
      }
  }

  static Value all(uint64_t x) { return Value{} + x; }

  // As above for the heads of a register, of which `left` are to be written.
  template <class Number>
  void fill(int64_t at, int64_t left, int64_t count, int64_t stride, int64_t* rows,
            bool streamed, const Number& number) const {
    const Heads heads = heads_[at];
    const auto remainder = [&](Value x) {
      const Doubles whole = __builtin_convertvector(reinterpret_cast<Signed>(x), Doubles);
      const Signed quotient = __builtin_convertvector(whole * heads.inverse, Signed);
      const Value rest = x - reinterpret_cast<Value>(quotient) * heads.size;
      return rest < heads.size ? rest : rest - heads.size;
    };
    const auto found = [&](int64_t t) {
      return reinterpret_cast<__m512i>(number(t, remainder) + heads.offset);
    };
    const __mmask8 written = static_cast<__mmask8>((1 << std::min(left, kWidth)) - 1);
    if (left < kWidth)
      for (int64_t t = 0; t < count; ++t)
        _mm512_mask_storeu_epi64(rows + t * stride, written, found(t));
    else if (streamed)
      for (int64_t t = 0; t < count; ++t)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(rows + t * stride), found(t));
    else
      for (int64_t t = 0; t < count; ++t) _mm512_storeu_si512(rows + t * stride, found(t));
  }

 private:
  struct Heads {
    Value size, offset;
    Doubles inverse;
  };
  std::vector<Heads> heads_;
};
#endif

struct Texts {
  const int64_t* token_ids;  // (B, L)
  const uint8_t* mask;       // (B, L), null if all tokens are real
  const int64_t* classes;    // of the tokens, then of where there is none
  int64_t vocabulary, boundary, length, wanted;

  bool ends(int64_t at) const { return (mask && !mask[at]) || token_ids[at] == boundary; }
};

// The classes of the tokens of a block at each distance before them.
struct Block {
  uint64_t tokens[kMostOrders + 1][kBlock];

  // Beyond padding, the end of a document and the beginning of a sequence there is no token.
  void gather(const Texts& texts, int64_t sequence, int64_t first, int64_t count, int64_t orders) {
    const int64_t* const ids = texts.token_ids + sequence * texts.length;
    const uint64_t nowhere = static_cast<uint64_t>(texts.classes[texts.vocabulary]);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t place = first + t;
      tokens[0][t] = static_cast<uint64_t>(texts.classes[ids[place]]);
      bool hidden = false;
      for (int64_t distance = 1; distance <= orders; ++distance) {
        const int64_t at = place - distance;
        hidden = hidden || at < 0 || texts.ends(sequence * texts.length + at);
        tokens[distance][t] = hidden ? nowhere : static_cast<uint64_t>(texts.classes[ids[at]]);
      }
    }
  }
};

struct Hash {
  const int64_t* multipliers;  // null for polynomials in the vocabulary
  int64_t orders, per_order;

  int64_t heads() const { return orders * per_order; }
};

// rows (count, H) of a block.
template <class Division>
void address(const Hash& hash, const Division& division, const Block& block, uint64_t base,
             int64_t count, bool streamed, int64_t* rows) {
  uint64_t mix[kBlock];
  const auto add = [&](int64_t distance) {
    const uint64_t factor = static_cast<uint64_t>(hash.multipliers[distance]);
    for (int64_t t = 0; t < count; ++t) {
      const uint64_t product = block.tokens[distance][t] * factor;
      mix[t] = distance ? mix[t] ^ product : product;
    }
  };
  if (hash.multipliers) add(0);
  int64_t at = 0;  // of the registers of all heads
  for (int64_t order = 1; order <= hash.orders; ++order) {
    if (hash.multipliers) add(order);
    for (int64_t p = 0; p < hash.per_order; p += Division::kWidth, ++at) {
      const auto fill = [&](const auto& number) {
        const int64_t head = (order - 1) * hash.per_order + p;
        division.fill(at, hash.per_order - p, count, hash.heads(), rows + head, streamed,
                      number);
      };
      if (hash.multipliers)
        fill([&](int64_t t, const auto& remainder) { return remainder(Division::all(mix[t])); });
      else
        fill([&](int64_t t, const auto& remainder) {
          auto value = remainder(Division::all(block.tokens[order][t]));
          for (int64_t distance = order - 1; distance >= 0; --distance)
            value = remainder(value * base + block.tokens[distance][t]);
          return value;
        });
    }
  }
}

// The same for a range of the tokens of all sequences.
template <class Division>
void address_all(const Texts& texts, const Hash& hash, const Division& division, int64_t first,
                 int64_t last, int64_t* rows) {
  const int64_t heads = hash.heads(), before = texts.length - texts.wanted;
  FreshPages fresh(rows + first * heads, rows + last * heads);
  const int64_t bytes = (last - first) * heads * int64_t{sizeof *rows};
  const bool streamed = bytes >= kStreamed && hash.per_order % Division::kWidth == 0 &&
                        reinterpret_cast<uintptr_t>(rows) % kCacheLine == 0;
  Block block;
  while (first < last) {
    const int64_t sequence = first / texts.wanted, place = first % texts.wanted;
    const int64_t count = std::min({texts.wanted - place, last - first, kBlock});
    if (bytes >= kFresh) fresh.before_writing(rows + (first + count) * heads);
    block.gather(texts, sequence, before + place, count, hash.orders);
    const uint64_t base = static_cast<uint64_t>(texts.vocabulary);
    address(hash, division, block, base, count, streamed, rows + first * heads);
    first += count;
  }
  if (streamed) finish_streaming();
}

}  // namespace
}  // namespace moezoo

using namespace moezoo;

// rows (B, S, H) of the last S of L tokens: by XOR of products with `multipliers` (O + 1,), which
// are null for polynomials in the vocabulary; modulo sizes (H,), plus offsets (H,). Classes are
// those of the tokens below `vocabulary`, then that of no token; `boundary` is -1 for none.
MOEZOO_API void moezoo_ngram_rows(const int64_t* token_ids, const uint8_t* mask,
                                  const int64_t* classes, int64_t vocabulary, int64_t boundary,
                                  const int64_t* multipliers, const int64_t* sizes,
                                  const int64_t* offsets, int64_t orders, int64_t per_order,
                                  int64_t sequences, int64_t length, int64_t wanted, int64_t* rows,
                                  int32_t threads) {
  const Texts texts{token_ids, mask, classes, vocabulary, boundary, length, wanted};
  const Hash hash{multipliers, orders, per_order};
  const auto run = [&](const auto& division) {
    parallel_ranges(sequences * wanted, kLeastTokens, threads, [&](int64_t first, int64_t last) {
      address_all(texts, hash, division, first, last, rows);
    });
  };
#if defined(__AVX512DQ__)
  if (*std::min_element(sizes, sizes + hash.heads()) >= SideBySide::kLeastSize) {
    run(SideBySide(sizes, offsets, hash.heads(), per_order));
    return;
  }
#endif
  run(OneByOne(sizes, offsets, hash.heads(), per_order));
}
