/* Adam's update of float32 masters in one pass over memory; see host_adam.py, also for the factors. */
#include <math.h>
#include <stdint.h>

typedef uint16_t bf16;

static inline float load_bf16(bf16 value) {
  union { uint32_t bits; float value; } whole = {(uint32_t)value << 16};
  return whole.value;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline bf16 round_bf16(float value) {
  union { float value; uint32_t bits; } whole = {value};
  uint32_t rounded = (whole.bits + 0x7fffu + ((whole.bits >> 16) & 1u)) >> 16;
  return value != value ? 0x7fc0 : (bf16)rounded;
}

static inline float load_float(float value) { return value; }
static inline float round_float(float value) { return value; }

#define STEP(NAME, GRADIENT, HOME)                                                                                     \
  void NAME(int64_t count, int threads, float *restrict master, const GRADIENT *restrict gradient,                     \
            float *restrict mean, float *restrict square, HOME *restrict home, const float *factors) {                 \
    const float scale = factors[0], shrink = factors[1], decay = factors[2], mean_share = factors[3];                  \
    const float square_share = factors[4], lr = factors[5], square_scale = factors[6], eps = factors[7];               \
    _Pragma("omp parallel for simd schedule(static) num_threads(threads)")                                             \
    for (int64_t i = 0; i < count; i++) {                                                                              \
      const float value = master[i], given = load_##GRADIENT(gradient[i]) * scale + decay * value;                     \
      const float first = mean[i] + mean_share * (given - mean[i]);                                                    \
      const float second = square[i] + square_share * (given * given - square[i]);                                     \
      const float updated = value * shrink - lr * first / (sqrtf(second) * square_scale + eps);                        \
      mean[i] = first;                                                                                                 \
      square[i] = second;                                                                                              \
      master[i] = updated;                                                                                             \
      home[i] = round_##HOME(updated);                                                                                 \
    }                                                                                                                  \
  }

STEP(step_bf16_bf16, bf16, bf16)
STEP(step_float_bf16, float, bf16)
STEP(step_bf16_float, bf16, float)
STEP(step_float_float, float, float)
