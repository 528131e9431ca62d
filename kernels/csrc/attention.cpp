// Attention in bfloat16, one (image, head) after another (attention_head.h); where the compiler's target does not multiply
// bfloat16, the functions say so and Python takes another way.
#include "attention_head.h"

namespace fastmim {

#ifdef FASTMIM_HAS_PRODUCTS
namespace {

template <class Head>
Status for_heads(const Shape& s, int64_t batch, int64_t at_once, int64_t threads, Head&& head) {
  if (!can_multiply()) return NO_HARDWARE;
  const int64_t room = room_for(s), groups = (batch + at_once - 1) / at_once;
  Floats scratch(room * std::max<int64_t>(1, threads));
  parallel_for(groups * s.heads, 1, threads, [&](int64_t begin, int64_t end, int64_t worker) {
    const Multiplier multiplier;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / s.heads * at_once, last = std::min(batch, first + at_once);
      for (int64_t image = first; image < last; ++image)
        head(image * s.heads + i % s.heads, scratch.at(worker * room));
    }
  });
  return OK;
}

// Images of which a thread computes the same head one after another: with a bias, its rows then stay in the cache.
template <Kind KIND>
constexpr int64_t AT_ONCE = KIND == BIASED ? IMAGES : 1;

template <Kind KIND>
Status forward(const Shape& s, const Inputs& x, double scale, const Selection& select, const Bias& bias, const Output& out,
               float* sums, int64_t batch, int64_t threads) {
  return for_heads(s, batch, AT_ONCE<KIND>, threads, [&](int64_t item, float* room) {
    forward_head<KIND>(s, x, static_cast<float>(scale), select, bias, item, room, out, sums);
  });
}

template <Kind KIND>
Status backward(const Shape& s, const Input& grad, const Inputs& x, const float* sums, double scale,
                const Selection& select, const Bias& bias, const Gradients& out, int64_t batch, int64_t threads) {
  return for_heads(s, batch, AT_ONCE<KIND>, threads, [&](int64_t item, float* room) {
    backward_head<KIND>(s, grad, x, sums, static_cast<float>(scale), select, bias, item, room, out);
  });
}

// The gradient of the bias, (heads, length, length), from its sums over IMAGES images each, in order.
void add_groups(const Shape& s, const float* sums, int64_t groups, int64_t threads, float* out) {
  const int64_t n = s.rows(), rows = s.heads * s.length;
  parallel_for(rows, 1, threads, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t j = 0; j < s.length; j += 16) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; ++g) total = _mm512_add_ps(total, _mm512_load_ps(sums + (g * rows + r) * n + j));
        _mm512_mask_storeu_ps(out + r * s.length + j, inside(s.length, j), total);
      }
    }
  });
}

// One of `slots` tables side by side: (batch, length, slots, heads, width).
template <class T>
Tokens<T> slot(const Shape& s, T* data, int64_t slots, int64_t i) {
  const int64_t row = slots * s.heads * s.width;
  return {data + i * s.heads * s.width, s.length * row, s.width, row};
}

// The strides of image, head and row, three of each table.
template <class T, class Data>
Tokens<T> strided(Data* data, const int64_t* strides, int64_t i) {
  return {static_cast<T*>(data), strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
}

}  // namespace
#endif

// qkv (batch, length, 3, heads, width) and out (batch, length, heads, width), bfloat16; bias (heads, length, length) or null.
// sums (batch, heads, length): the logarithms to base 2 of the sums that the softmax divides by.
static Status qkv_attention(const void* qkv, const float* bias, double scale, int64_t batch, int64_t length, int64_t heads,
                            int64_t width, void* out, float* sums, int64_t threads) {
#ifdef FASTMIM_HAS_PRODUCTS
  const Shape s{length, heads, width};
  const auto* x = static_cast<const bfloat16*>(qkv);
  const Inputs inputs{slot(s, x, 3, 0), slot(s, x, 3, 1), slot(s, x, 3, 2)};
  const auto result = slot(s, static_cast<bfloat16*>(out), 1, 0);
  if (bias) return forward<BIASED>(s, inputs, scale, {}, {bias, nullptr}, result, sums, batch, threads);
  return forward<ALL>(s, inputs, scale, {}, {}, result, sums, batch, threads);
#else
  (void)qkv, (void)bias, (void)scale, (void)batch, (void)length, (void)heads, (void)width, (void)out, (void)sums,
      (void)threads;
  return NO_HARDWARE;
#endif
}

// grad like out; for_qkv like qkv; for_bias like bias, or null.
static Status qkv_attention_backward(const void* grad, const void* qkv, const float* bias, const float* sums, double scale,
                                     int64_t batch, int64_t length, int64_t heads, int64_t width, void* for_qkv,
                                     float* for_bias, int64_t threads) {
#ifdef FASTMIM_HAS_PRODUCTS
  const Shape s{length, heads, width};
  const auto *x = static_cast<const bfloat16*>(qkv), *g = static_cast<const bfloat16*>(grad);
  auto* out = static_cast<bfloat16*>(for_qkv);
  const Inputs inputs{slot(s, x, 3, 0), slot(s, x, 3, 1), slot(s, x, 3, 2)};
  const Gradients outputs{slot(s, out, 3, 0), slot(s, out, 3, 1), slot(s, out, 3, 2)};
  if (!bias) return backward<ALL>(s, slot(s, g, 1, 0), inputs, sums, scale, {}, {}, outputs, batch, threads);
  const int64_t groups = (batch + IMAGES - 1) / IMAGES, size = for_bias ? groups * heads * length * s.rows() : 0;
  Floats group_sums(size);
  std::fill_n(group_sums.at(0), size, 0.0f);
  const Bias added{bias, for_bias ? group_sums.at(0) : nullptr};
  const Status status =
      backward<BIASED>(s, slot(s, g, 1, 0), inputs, sums, scale, {}, added, outputs, batch, threads);
  if (for_bias && status == OK) add_groups(s, group_sums.at(0), groups, threads, for_bias);
  return status;
#else
  (void)grad, (void)qkv, (void)bias, (void)sums, (void)scale, (void)batch, (void)length, (void)heads, (void)width,
      (void)for_qkv, (void)for_bias, (void)threads;
  return NO_HARDWARE;
#endif
}

// q, k, v and out (batch, heads, length, width), bfloat16, with `strides` of image, head and row of each in turn. labels
// (batch, length - prefix) and counts (batch, heads, length - prefix), or both null. sums as above, of the keys kept; least
// like sums: what a score, unscaled, must reach to be kept.
static Status topk_attention(const void* q, const void* k, const void* v, void* out, const int64_t* strides, double scale,
                         int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t prefix, int64_t topk,
                         float* sums, float* least, const int64_t* labels, int64_t* counts, int64_t threads) {
#ifdef FASTMIM_HAS_PRODUCTS
  using In = const bfloat16;
  const Inputs inputs{strided<In>(q, strides, 0), strided<In>(k, strides, 1), strided<In>(v, strides, 2)};
  const Quota quota(length - prefix, topk);
  return forward<BEST>({length, heads, width}, inputs, scale, {prefix, least, &quota, labels, counts}, {},
                       strided<bfloat16>(out, strides, 3), sums, batch, threads);
#else
  (void)q, (void)k, (void)v, (void)out, (void)strides, (void)scale, (void)batch, (void)length, (void)heads, (void)width,
      (void)prefix, (void)topk, (void)sums, (void)least, (void)labels, (void)counts, (void)threads;
  return NO_HARDWARE;
#endif
}

// The same tables, and gradients of out, q, k and v: strides of grad, q, k, v, for_q, for_k and for_v in turn.
static Status topk_attention_backward(const void* grad, const void* q, const void* k, const void* v, void* for_q, void* for_k,
                                  void* for_v, const int64_t* strides, double scale, int64_t batch, int64_t length,
                                  int64_t heads, int64_t width, int64_t prefix, const float* sums, float* least,
                                  int64_t threads) {
#ifdef FASTMIM_HAS_PRODUCTS
  using In = const bfloat16;
  const Inputs inputs{strided<In>(q, strides, 1), strided<In>(k, strides, 2), strided<In>(v, strides, 3)};
  const Gradients outputs{strided<bfloat16>(for_q, strides, 4), strided<bfloat16>(for_k, strides, 5),
                          strided<bfloat16>(for_v, strides, 6)};
  return backward<BEST>({length, heads, width}, strided<In>(grad, strides, 0), inputs, sums, scale,
                        {prefix, least, nullptr, nullptr, nullptr}, {}, outputs, batch, threads);
#else
  (void)grad, (void)q, (void)k, (void)v, (void)for_q, (void)for_k, (void)for_v, (void)strides, (void)scale, (void)batch,
      (void)length, (void)heads, (void)width, (void)prefix, (void)sums, (void)least, (void)threads;
  return NO_HARDWARE;
#endif
}

FASTMIM_EXPORT(qkv_attention)
FASTMIM_EXPORT(qkv_attention_backward)
FASTMIM_EXPORT(topk_attention)
FASTMIM_EXPORT(topk_attention_backward)

}  // namespace fastmim
