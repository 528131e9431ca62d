// What all kernels share: element types, status codes, threads, scratch memory, and how a function is exported.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

namespace fastmim {

// Returned by every exported function; native_library.py turns them into exceptions.
enum Status : int { OK = 0, NO_MEMORY = 1, BAD_INDEX = 2, BAD_DTYPE = 3, NO_HARDWARE = 4 };

// Element types as they cross the C interface; native_library.py has the same numbers.
enum Dtype : int64_t { UINT8 = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(float v) { return v; }
inline float to_float(uint8_t v) { return static_cast<float>(static_cast<int32_t>(v)); }
inline float to_float(bfloat16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

// Half precision by integer arithmetic, because loops over it then vectorize on any machine. Normal numbers: shift
// exponent and fraction into place and scale by 2^-112; subnormal ones: put the fraction below a 0.5 and subtract that.
inline float to_float(float16 v) {
  const uint32_t word = static_cast<uint32_t>(v.bits) << 16, twice = word + word;
  const float normal = bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = twice < (1u << 27) ? bit_cast<uint32_t>(subnormal) : bit_cast<uint32_t>(normal);
  return bit_cast<float>((word & 0x80000000u) | magnitude);
}

inline void from_float(float v, float& out) { out = v; }

// Round to nearest even; a NaN stays one.
inline void from_float(float v, bfloat16& out) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(v != v ? 0x7FC0u : rounded);
}

// Adding a power of two of the right size lets the float unit round at the last bit that a half keeps.
inline void from_float(float v, float16& out) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits & 0x80000000u, twice = bits + bits;
  const float magnitude = bit_cast<float>(bits & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
  uint32_t bias = twice & 0xFF000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t half = ((sum >> 13) & 0x00007C00u) + (sum & 0x00000FFFu);
  out.bits = static_cast<uint16_t>((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : half));
}

template <class T>
inline T rounded(float v) {
  T out;
  from_float(v, out);
  return out;
}

// lanes[0] becomes both(...) of all N lanes, a power of two. N is known so that each halving is one vector operation.
template <int N, class T, class Both>
inline void fold(T* lanes, Both both) {
#pragma omp simd
  for (int j = 0; j < N / 2; ++j) lanes[j] = both(lanes[j], lanes[j + N / 2]);
  if constexpr (N > 2) fold<N / 2>(lanes, both);
}

// Sum of term(i) over 0..n-1. 64 running sums: with one vector of them, each addition would wait for the one before.
template <class Term>
inline float reduce(int64_t n, Term term) {
  constexpr int LANES = 64;
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
#pragma omp simd
    for (int j = 0; j < LANES; ++j) lanes[j] += term(i + j);
  for (; i + 16 <= n; i += 16)
#pragma omp simd
    for (int j = 0; j < 16; ++j) lanes[j] += term(i + j);
  fold<LANES>(lanes, [](float a, float b) { return a + b; });
  float total = lanes[0];
  for (; i < n; ++i) total += term(i);
  return total;
}

// The largest of n >= 1 floats; NaN are passed over.
inline float largest(const float* p, int64_t n) {
  constexpr int LANES = 64;
  const auto larger = [](float a, float b) { return a < b ? b : a; };
  float best = p[0];
  int64_t i = 0;
  if (n >= LANES) {
    float lanes[LANES];
    std::copy_n(p, LANES, lanes);
    for (i = LANES; i + LANES <= n; i += LANES)
#pragma omp simd
      for (int j = 0; j < LANES; ++j) lanes[j] = larger(lanes[j], p[i + j]);
    fold<LANES>(lanes, larger);
    best = lanes[0];
  }
  for (; i < n; ++i) best = larger(best, p[i]);
  return best;
}

// Calls body(T()) with the C++ type of a floating dtype.
template <class Body>
inline Status with_float(int64_t dtype, Body&& body) {
  switch (dtype) {
    case FLOAT32: return body(float());
    case BFLOAT16: return body(bfloat16());
    case FLOAT16: return body(float16());
    default: return BAD_DTYPE;
  }
}

// The same, for uint8 as well.
template <class Body>
inline Status with_pixel(int64_t dtype, Body&& body) {
  return dtype == UINT8 ? body(uint8_t()) : with_float(dtype, std::forward<Body>(body));
}

// Ids are not checked by Python under torch.compile.
inline Status check_ids(const int64_t* ids, int64_t n, int64_t count) {
  bool is_inside = true;
  for (int64_t i = 0; i < n; ++i) is_inside &= ids[i] >= 0 && ids[i] < count;
  return is_inside ? OK : BAD_INDEX;
}

// Uninitialized floats, aligned for the widest vectors.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(::operator new(sizeof(float) * static_cast<size_t>(count + 1), ALIGNMENT))) {}
  ~Floats() { ::operator delete(data_, ALIGNMENT); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* at(int64_t i) { return data_ + i; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  float* data_;
};

// Asks for huge pages under a large result that is about to be written. Fresh memory otherwise faults every 4 KB, which
// took longer than the writing: 38 MB of zeros, one thread of a virtual Xeon: 12.8 ms without, 5.6 ms with.
inline void expect_writes(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t PAGE = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(2 * PAGE)) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + PAGE - 1) / PAGE * PAGE, end = (start + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
  // A refusal changes nothing but the speed.
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Floats per worker, rounded up so that no two workers share a cache line.
inline int64_t padded(int64_t count) { return (count + 31) / 32 * 32; }

// torch's own OpenMP runtime, handed over by native_library.py: the library links to none, so there is never a second
// pool of threads. Without it the kernels run on the calling thread.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*team)();
};
extern OpenMP openmp;

// Splits 0..count-1 into one range per worker: body(begin, end, worker) with worker < threads. A worker gets at least
// `grain` items. body must not throw: allocate before.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, int64_t threads, Body&& body) {
  const int64_t workers = std::min(threads, count / std::max<int64_t>(grain, 1));
  if (count <= 0) return;
  if (workers <= 1 || !openmp.parallel) {
    body(int64_t{0}, count, int64_t{0});
    return;
  }
  struct Job {
    std::remove_reference_t<Body>* body;
    int64_t count;
  } job{&body, count};
  openmp.parallel(
      [](void* data) {
        const Job& job = *static_cast<Job*>(data);
        const int64_t worker = openmp.thread(), team = openmp.team();
        const int64_t begin = job.count * worker / team, end = job.count * (worker + 1) / team;
        if (begin < end) (*job.body)(begin, end, worker);
      },
      &job, static_cast<unsigned>(workers), 0);
}

// One letter per argument type, from which native_library.py builds the call: a library that does not fit the Python
// beside it is found out by the number and kind of arguments.
template <class T>
constexpr char letter() {
  constexpr bool is_integer = std::is_same_v<T, int64_t>, is_number = is_integer || std::is_same_v<T, double>;
  static_assert(std::is_pointer_v<T> || is_number, "arguments are pointers, int64_t or double");
  return std::is_pointer_v<T> ? 'p' : is_integer ? 'i' : 'd';
}

struct Entry {
  const char* arguments;
  void* function;
};

template <auto F>
struct Export;
template <class... A, Status (*F)(A...)>
struct Export<F> {
  static constexpr char arguments[] = {letter<A>()..., '\0'};
  static int call(A... a) {
    try {
      return F(a...);
    } catch (const std::bad_alloc&) {
      return NO_MEMORY;
    }
  }
};

}  // namespace fastmim

// Makes fastmim::NAME visible to native_library.py as the data symbol fastmim_NAME.
#define FASTMIM_EXPORT(NAME)                                                                            \
  extern "C" {                                                                                          \
  __attribute__((visibility("default"))) extern const fastmim::Entry fastmim_##NAME;                    \
  const fastmim::Entry fastmim_##NAME = {fastmim::Export<&fastmim::NAME>::arguments,                    \
                                         reinterpret_cast<void*>(&fastmim::Export<&fastmim::NAME>::call)}; \
  }
