/* What the two sets of Arm share: two registers are one vector of eight. */
#define VECTOR float32x4x2_t
#define LANES 8
#define ZERO neon_both(vdupq_n_f32(0), vdupq_n_f32(0))
#define LOAD(p) neon_both(vld1q_f32(p), vld1q_f32((p) + 4))
#define STORE(p, v) neon_store(p, v)
#define BROADCAST(f) neon_both(vdupq_n_f32(f), vdupq_n_f32(f))
#define FMA(a, b, c) neon_fma(a, b, c)
#define SUM(v) vaddvq_f32(vaddq_f32((v).val[0], (v).val[1]))
#define LOAD_BFLOAT16(p) neon_bfloat16(vld1q_u16(p))
#define LOAD_FLOAT16(p) neon_float16(vreinterpretq_f16_u16(vld1q_u16(p)))
#define LOAD_INT8(p) neon_int8(vmovl_s8(vld1_s8(p)))
#define GROUP 2

INLINE float32x4x2_t neon_both(float32x4_t low, float32x4_t high) { return (float32x4x2_t){{low, high}}; }
INLINE void neon_store(float *p, float32x4x2_t v) {
  vst1q_f32(p, v.val[0]);
  vst1q_f32(p + 4, v.val[1]);
}
INLINE float32x4x2_t neon_fma(float32x4x2_t a, float32x4x2_t b, float32x4x2_t c) {
  return neon_both(vfmaq_f32(c.val[0], a.val[0], b.val[0]), vfmaq_f32(c.val[1], a.val[1], b.val[1]));
}
INLINE float32x4x2_t neon_bfloat16(uint16x8_t bits) {
  return neon_both(vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
                   vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(bits), 16)));
}
INLINE float32x4x2_t neon_float16(float16x8_t v) {
  return neon_both(vcvt_f32_f16(vget_low_f16(v)), vcvt_f32_f16(vget_high_f16(v)));
}
INLINE float32x4x2_t neon_int8(int16x8_t v) {
  return neon_both(vcvtq_f32_s32(vmovl_s16(vget_low_s16(v))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(v))));
}
