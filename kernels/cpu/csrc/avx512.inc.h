/* What the two sets with vectors of 512 bits share. */
#define VECTOR __m512
#define LANES 16
#define ZERO _mm512_setzero_ps()
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define BROADCAST(f) _mm512_set1_ps(f)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM(v) _mm512_reduce_add_ps(v)
#define SIXTEEN(p) _mm256_loadu_si256((const __m256i *)(p))
#define LOAD_BFLOAT16(p) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(SIXTEEN(p)), 16))
#define LOAD_FLOAT16(p) _mm512_cvtph_ps(SIXTEEN(p))
#define LOAD_INT8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define GROUP 4
