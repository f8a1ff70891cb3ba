/* One matrix multiplication over GF(2^8) for one instruction set: a template that _gf256.c includes once for each.
 *
 * Law: it trusts its caller with everything (bounds, overlap, rows <= ROWS) and touches no Python object. The includer defines
 *   FN(x)     the name x with the instruction set in it        TARGET    the attribute that turns the instructions on
 *   WIDTH     bytes of one vector                              VECTORS   vectors of each row held in registers at once
 *   ROWS      most rows held in registers at once
 * and these functions:
 *   FN(vector) FN(zero)(void), FN(load)(from), FN(store)(to, v)
 *   FN(parts)  FN(split)(v)           what a factor multiplies: the vector itself, or its nibbles
 *   FN(factor) FN(prepare)(byte)      one coefficient made ready
 *   FN(vector) FN(add)(sum, parts, factor)                     sum ^ factor * parts
 */

enum { FN(rows) = ROWS };

static INLINE TARGET FN(vector) FN(load_some)(const uint8_t *from, size_t bytes)
{
    uint8_t whole[WIDTH] = {0};
    if (bytes == WIDTH)
        return FN(load)(from);
    memcpy(whole, from, bytes);
    return FN(load)(whole);
}

static INLINE TARGET void FN(store_some)(uint8_t *to, FN(vector) v, size_t bytes)
{
    uint8_t whole[WIDTH];
    if (bytes == WIDTH) {
        FN(store)(to, v);
        return;
    }
    FN(store)(whole, v);
    memcpy(to, whole, bytes);
}

/* `rows` and `vectors` are constants wherever this is inlined, so `sum` lives in registers. `bytes` is WIDTH but for a tail. */
static INLINE TARGET void FN(step)(const struct work *w, const int rows, const int vectors, size_t at, size_t bytes)
{
    FN(vector) sum[ROWS][VECTORS];
    FN(parts) x[VECTORS];

    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[r][v] = w->accumulate ? FN(load_some)(w->out[r] + at + v * WIDTH, bytes) : FN(zero)();
    for (int c = 0; c < w->cols; c++) {
        UNROLL for (int v = 0; v < vectors; v++)
            x[v] = FN(split)(FN(load_some)(w->in[c] + at + v * WIDTH, bytes));
        UNROLL for (int r = 0; r < rows; r++) {
            const FN(factor) f = FN(prepare)(w->matrix[r * w->cols + c]);
            UNROLL for (int v = 0; v < vectors; v++)
                sum[r][v] = FN(add)(sum[r][v], x[v], f);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            FN(store_some)(w->out[r] + at + v * WIDTH, sum[r][v], bytes);
}

static INLINE TARGET void FN(range)(const struct work *w, const int rows, size_t from, size_t to)
{
    for (; to - from >= WIDTH * VECTORS; from += WIDTH * VECTORS)
        FN(step)(w, rows, VECTORS, from, WIDTH);
    for (; to - from >= WIDTH; from += WIDTH)
        FN(step)(w, rows, 1, from, WIDTH);
    if (from < to)
        FN(step)(w, rows, 1, from, to - from);
}

static TARGET void FN(kernel)(const struct work *w, size_t from, size_t to)
{
    switch (w->rows) {
    case 1: FN(range)(w, 1, from, to); break;
    case 2: FN(range)(w, 2, from, to); break;
    case 3: FN(range)(w, 3, from, to); break;
    case 4: FN(range)(w, 4, from, to); break;
    case 5: FN(range)(w, 5, from, to); break;
    case 6: FN(range)(w, 6, from, to); break;
#if ROWS > 6
    case 7: FN(range)(w, 7, from, to); break;
    case 8: FN(range)(w, 8, from, to); break;
#endif
    default: break;
    }
}

#undef FN
#undef TARGET
#undef WIDTH
#undef VECTORS
#undef ROWS
