/* Gradient steps of the two-layer networks of two_layer.py, which has the models and calls this.

   One step of 1-SAM on one sample is a few passes over 15,500 numbers, a microsecond or two; as operators of a
   framework it would be a hundred times that.  What makes it short:

   - The gradient of a sample in the first layer is delta x', x' being the input with a 1 for the bias, so that
     its norm is ||delta|| ||x'||, and at the perturbed weights W + c delta x' the pre-activations are z + c ||x'||^2 delta.
   - A step's update of W and the next step's W x' are one pass over W (advance).
   - Sim-BN's statistics are those of the training set.  A row of W has a gradient only where its unit is active at
     the sample, and pre-activations of the whole set are kept and computed again for such rows alone.

   REAL is float or double.  The caller's arrays are copied to aligned ones and back. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif
#define BYTES 64
#define LANES (BYTES / (int)sizeof(REAL))
#define BLOCK (4 * LANES) /* units, or samples, in four registers */
#define ROW 32            /* a row of (W1, b1), padded */
#define EPS ((REAL)1e-6)  /* of Sim-LN */

typedef REAL vec __attribute__((vector_size(BYTES)));
typedef __typeof__((vec){0} > (vec){0}) lanes;
enum { PLAIN = 0, SIM_LN = 1, SIM_BN = 2 };
enum { SAM = 0, TRACE = 1 };

static REAL *made(long count) {
    long bytes = (count * (long)sizeof(REAL) + BYTES - 1) / BYTES * BYTES;
    REAL *p = aligned_alloc(BYTES, bytes);
    memset(p, 0, bytes);
    return p;
}

/* ---------------------------------------------------------------- one sample: W is [dims][m] */

/* W <- keep W - delta old^T, z = W x. */
static void advance(REAL *W, const REAL *delta, const REAL *old, REAL keep, const REAL *x, REAL *z, int m, int dims) {
    for (int j = 0; j < m; j += BLOCK) {
        const vec *g = (const vec *)(delta + j);
        vec g0 = g[0], g1 = g[1], g2 = g[2], g3 = g[3];
        vec z0 = {0}, z1 = {0}, z2 = {0}, z3 = {0};
        REAL *row = W + j;
        for (int d = 0; d < dims; d++, row += m) {
            vec *w = (vec *)row;
            vec w0 = w[0] * keep - g0 * old[d], w1 = w[1] * keep - g1 * old[d];
            vec w2 = w[2] * keep - g2 * old[d], w3 = w[3] * keep - g3 * old[d];
            w[0] = w0, w[1] = w1, w[2] = w2, w[3] = w3;
            z0 += w0 * x[d], z1 += w1 * x[d], z2 += w2 * x[d], z3 += w3 * x[d];
        }
        vec *out = (vec *)(z + j);
        out[0] = z0, out[1] = z1, out[2] = z2, out[3] = z3;
    }
}

/* delta = d loss / d z, dv = d loss / d V, of (f - y)^2. */
static void gradient(int model, const REAL *z, const REAL *V, REAL y, int m, REAL *delta, REAL *dv) {
    REAL f = 0, s = 0;
#pragma omp simd reduction(+ : f, s)
    for (int j = 0; j < m; j++) {
        REAL h = z[j] > 0 ? z[j] : 0;
        f += V[j] * h;
        s += h * h;
    }
    REAL scale = 1, back = 0;
    if (model == SIM_LN) {
        REAL norm = (REAL)sqrt((double)s);
        scale = 1 / (norm > EPS ? norm : EPS);
        f *= scale;
        back = norm > EPS ? f * scale : 0;
    }
    REAL e = 2 * (f - y) * scale;
#pragma omp simd
    for (int j = 0; j < m; j++) {
        REAL h = z[j] > 0 ? z[j] : 0;
        delta[j] = z[j] > 0 ? e * (V[j] - back * h) : 0;
        dv[j] = e * h;
    }
}

/* The traces of (W1, b1) and of W2, 2 / count sum_i ||df_i/dW||^2, of a plain network. */
static void traces(const REAL *W, const REAL *V, const REAL *X, int count, int m, int dims, REAL *zero, REAL *z,
                   double *first, double *second) {
    *first = *second = 0;
    for (int i = 0; i < count; i++) {
        const REAL *x = X + (long)i * dims;
        REAL q = 0, a = 0, b = 0;
        for (int d = 0; d < dims; d++) q += x[d] * x[d];
        advance((REAL *)W, zero, x, 1, x, z, m, dims);
#pragma omp simd reduction(+ : a, b)
        for (int j = 0; j < m; j++) {
            a += z[j] > 0 ? V[j] * V[j] : 0;
            b += z[j] > 0 ? z[j] * z[j] : 0;
        }
        *first += 2.0 * q * a / count;
        *second += 2.0 * b / count;
    }
}

/* Steps of batch 1.  method SAM: strength is rho; TRACE: lambda, the gradient of (f - y)^2 + lambda 2 ||df||^2.
   every > 0: before every so many steps, counted from `begun`, the weights move to the representative: a plain
   network to equal traces of its layers, on the whole set or on the sample of the step; Sim-LN to the norm `radius`. */
void sample_steps(int model, int method, int m, int dims, int n, REAL *W0, REAL *V0, const REAL *X, const REAL *y,
                  const int *order, long steps, long begun, double lr, double strength, int every, int whole,
                  double radius) {
    REAL *W = made((long)dims * m), *V = made(m), *V2 = made(m), *z = made(m), *z2 = made(m);
    REAL *delta = made(m), *dv = made(m), *zero = made(m), *scratch = made(m);
    memcpy(W, W0, sizeof(REAL) * dims * m);
    memcpy(V, V0, sizeof(REAL) * m);
    const REAL *old = X;
    for (long t = 0; t < steps; t++) {
        const REAL *x = X + (long)order[t] * dims, target = y[order[t]];
        REAL q = 0;
        for (int d = 0; d < dims; d++) q += x[d] * x[d];
        if (every > 0 && (begun + t) % every == 0) {
            advance(W, delta, old, 1, x, scratch, m, dims);
            memset(delta, 0, sizeof(REAL) * m);
            double up = 1, down = 1;
            if (model == SIM_LN) {
                double s = 0;
                for (long k = 0; k < (long)dims * m; k++) s += (double)W[k] * W[k];
                up = radius / sqrt(s);
            } else {
                double first, second;
                traces(W, V, whole ? X : x, whole ? n : 1, m, dims, zero, scratch, &first, &second);
                if (first > 0 && second > 0) up = sqrt(sqrt(first / second)), down = 1 / up;
            }
            for (long k = 0; k < (long)dims * m; k++) W[k] *= (REAL)up;
            for (int j = 0; j < m; j++) V[j] *= (REAL)down;
        }
        advance(W, delta, old, 1, x, z, m, dims);
        gradient(model, z, V, target, m, delta, dv);
        if (method == SAM && strength > 0) {
            REAL s = 0, r = 0;
#pragma omp simd reduction(+ : s, r)
            for (int j = 0; j < m; j++) {
                s += delta[j] * delta[j];
                r += dv[j] * dv[j];
            }
            REAL norm = (REAL)sqrt((double)(q * s + r));
            if (norm > 0) {
                REAL c = (REAL)strength / norm;
#pragma omp simd
                for (int j = 0; j < m; j++) {
                    z2[j] = z[j] + c * q * delta[j];
                    V2[j] = V[j] + c * dv[j];
                }
                gradient(model, z2, V2, target, m, delta, dv);
            }
        } else if (method == TRACE) {
            REAL l = (REAL)(4 * strength);
#pragma omp simd
            for (int j = 0; j < m; j++) {
                delta[j] += z[j] > 0 ? l * z[j] : 0;
                dv[j] += z[j] > 0 ? l * q * V[j] : 0;
            }
        }
        REAL rate = (REAL)lr;
#pragma omp simd
        for (int j = 0; j < m; j++) {
            V[j] -= rate * dv[j];
            delta[j] *= rate;
        }
        old = x;
    }
    advance(W, delta, old, 1, old, scratch, m, dims);
    memcpy(W0, W, sizeof(REAL) * dims * m);
    memcpy(V0, V, sizeof(REAL) * m);
    free(W), free(V), free(V2), free(z), free(z2), free(delta), free(dv), free(zero), free(scratch);
}

/* ---------------------------------------------------------------- the whole set: W is [m][ROW] */

/* h = relu(w X^T) of all samples, [np]; returns sqrt(mean h^2). */
static REAL forward(const REAL *w, const REAL *Xt, int n, int np, REAL *h) {
    vec s = {0};
    for (int k = 0; k < np; k += BLOCK) {
        vec z[4] = {{0}, {0}, {0}, {0}};
        for (int d = 0; d < ROW; d++) {
            const vec *x = (const vec *)(Xt + (long)d * np + k);
            for (int b = 0; b < 4; b++) z[b] += x[b] * w[d];
        }
        vec *out = (vec *)(h + k);
        for (int b = 0; b < 4; b++) {
            vec r = (vec)((lanes)z[b] & (z[b] > 0)); /* C has no ?: of vectors */
            out[b] = r;
            s += r * r;
        }
    }
    REAL total = 0;
    for (int l = 0; l < LANES; l++) total += s[l];
    return (REAL)sqrt((double)total / n);
}

/* out = sum_k g_k x_k, [ROW]; np is a multiple of 4 and g is 0 beyond the samples. */
static void backward(const REAL *g, const REAL *X, int n, REAL *out) {
    enum { PARTS = ROW * (int)sizeof(REAL) / BYTES };
    vec a[4][PARTS] = {{{0}}};
    for (int k = 0; k < n; k += 4)
        for (int u = 0; u < 4; u++)
            for (int p = 0; p < PARTS; p++) a[u][p] += ((const vec *)(X + (long)(k + u) * ROW))[p] * g[k + u];
    for (int p = 0; p < PARTS; p++) ((vec *)out)[p] = (a[0][p] + a[1][p]) + (a[2][p] + a[3][p]);
}

typedef struct {
    REAL *X, *Xt, *y;
    int n, np;
} Set;

static Set set_of(const REAL *X, const REAL *y, int n) {
    Set s = {0, 0, 0, n, (n + BLOCK - 1) / BLOCK * BLOCK};
    s.X = made((long)s.np * ROW), s.Xt = made((long)s.np * ROW), s.y = made(s.np);
    memcpy(s.X, X, sizeof(REAL) * n * ROW);
    memcpy(s.y, y, sizeof(REAL) * n);
    for (int k = 0; k < n; k++)
        for (int d = 0; d < ROW; d++) s.Xt[(long)d * s.np + k] = X[(long)k * ROW + d];
    return s;
}

static void drop(Set s) { free(s.X), free(s.Xt), free(s.y); }

/* Gradient descent on the mean over the set, with weight decay on all parameters. */
void batch_steps(int model, int m, int n, REAL *W0, REAL *V, REAL *gamma, const REAL *X0, const REAL *y0, long steps,
                 double lr0, double decay0) {
    Set set = set_of(X0, y0, n);
    int np = set.np;
    REAL lr = (REAL)lr0, decay = (REAL)decay0;
    REAL *W = made((long)m * ROW), *H = made((long)m * np), *s = made(m), *f = made(np), *norm = made(np);
    REAL *r = made(np), *back = made(np), *dz = made(np), *G = made(ROW);
    memcpy(W, W0, sizeof(REAL) * m * ROW);
    for (long t = 0; t < steps; t++) {
        memset(f, 0, sizeof(REAL) * np);
        memset(norm, 0, sizeof(REAL) * np);
        for (int j = 0; j < m; j++) {
            REAL *h = H + (long)j * np;
            s[j] = forward(W + (long)j * ROW, set.Xt, n, np, h);
            REAL c = model != SIM_BN ? V[j] : s[j] > 0 ? *gamma * V[j] / s[j] : 0;
#pragma omp simd
            for (int k = 0; k < np; k++) {
                f[k] += c * h[k];
                norm[k] += h[k] * h[k];
            }
        }
        for (int k = 0; k < n; k++) {
            REAL scale = 1;
            back[k] = 0;
            if (model == SIM_LN) {
                REAL found = (REAL)sqrt((double)norm[k]);
                scale = 1 / (found > EPS ? found : EPS);
                f[k] *= scale;
                back[k] = found > EPS ? f[k] * scale : 0;
            }
            r[k] = 2 * (f[k] - set.y[k]) * scale / n;
        }
        REAL dgamma = 0;
        for (int j = 0; j < m; j++) {
            const REAL *h = H + (long)j * np;
            REAL *w = W + (long)j * ROW, a = 0;
#pragma omp simd reduction(+ : a)
            for (int k = 0; k < np; k++) a += r[k] * h[k];
            REAL out = V[j], dv = a, common = 0;
            if (model == SIM_BN) {
                REAL inverse = s[j] > 0 ? 1 / s[j] : 0;
                out = *gamma * V[j] * inverse;
                dv = *gamma * a * inverse;
                dgamma += V[j] * a * inverse;
                common = out * a * inverse * inverse / n;
            }
#pragma omp simd
            for (int k = 0; k < np; k++) dz[k] = h[k] > 0 ? r[k] * (out - back[k] * h[k]) - common * h[k] : 0;
            backward(dz, set.X, n, G);
            for (int d = 0; d < ROW; d++) w[d] -= lr * (G[d] + decay * w[d]);
            V[j] -= lr * (dv + decay * V[j]);
        }
        if (model == SIM_BN) *gamma -= lr * (dgamma + decay * *gamma);
    }
    memcpy(W0, W, sizeof(REAL) * m * ROW);
    drop(set);
    free(W), free(H), free(s), free(f), free(norm), free(r), free(back), free(dz), free(G);
}

/* The gradient of (f_i - y_i)^2 for Sim-BN in the rows that are listed; f_i and all rows' h_i come from them alone. */
static double bn_gradient(const Set *set, int i, const int *rows, int count, const REAL *V, REAL gamma, const REAL *H,
                          const REAL *s, REAL *G, REAL *dv, REAL *dgamma) {
    int np = set->np, n = set->n;
    REAL u = 0;
    double square = 0;
    for (int a = 0; a < count; a++) {
        REAL h = H[(long)rows[a] * np + i];
        if (h > 0) u += V[rows[a]] * h / s[rows[a]];
    }
    REAL e = 2 * (gamma * u - set->y[i]);
    *dgamma = e * u;
    for (int a = 0; a < count; a++) {
        int j = rows[a];
        REAL h = H[(long)j * np + i], *g = G + (long)j * ROW;
        if (!(h > 0)) {
            memset(g, 0, sizeof(REAL) * ROW);
            dv[j] = 0;
            continue;
        }
        REAL out = e * V[j] * gamma / s[j], common = out * h / (n * s[j] * s[j]), sum = 0;
        const REAL *x = set->X + (long)i * ROW;
        backward(H + (long)j * np, set->X, n, g);
#pragma omp simd reduction(+ : sum)
        for (int d = 0; d < ROW; d++) {
            g[d] = out * x[d] - common * g[d];
            sum += g[d] * g[d];
        }
        dv[j] = e * gamma * h / s[j];
        square += (double)sum + (double)dv[j] * dv[j];
    }
    return square + (double)*dgamma * *dgamma;
}

/* 1-SAM for Sim-BN.  every > 0: before every so many steps (W1, b1) goes to the norm `radius`, and gamma and W2, whose
   traces are 2 mean f^2 / gamma^2 and 2 gamma^2 (units that are not dead), to equal ones. */
void bn_steps(int m, int n, REAL *W0, REAL *V, REAL *gamma, const REAL *X0, const REAL *y0, const int *order,
              long steps, long begun, double lr0, double rho, int every, double radius) {
    Set set = set_of(X0, y0, n);
    int np = set.np, *rows = malloc(sizeof(int) * m);
    REAL lr = (REAL)lr0;
    REAL *W = made((long)m * ROW), *H = made((long)m * np), *s = made(m), *H2 = made((long)m * np), *s2 = made(m);
    REAL *V2 = made(m), *G = made((long)m * ROW), *dv = made(m), *w2 = made(ROW), *f = made(np);
    memcpy(W, W0, sizeof(REAL) * m * ROW);
    for (int j = 0; j < m; j++) s[j] = forward(W + (long)j * ROW, set.Xt, n, np, H + (long)j * np);
    for (long t = 0; t < steps; t++) {
        int i = order[t], count = 0;
        if (every > 0 && (begun + t) % every == 0) {
            double square = 0, mean = 0, alive = 0;
            for (long k = 0; k < (long)m * ROW; k++) square += (double)W[k] * W[k];
            for (long k = 0; k < (long)m * ROW; k++) W[k] *= (REAL)(radius / sqrt(square));
            memset(f, 0, sizeof(REAL) * np);
            for (int j = 0; j < m; j++) {
                s[j] = forward(W + (long)j * ROW, set.Xt, n, np, H + (long)j * np);
                alive += s[j] > 0;
                for (int k = 0; k < n && s[j] > 0; k++) f[k] += *gamma * V[j] * H[(long)j * np + k] / s[j];
            }
            for (int k = 0; k < n; k++) mean += (double)f[k] * f[k] / n;
            double up = sqrt(sqrt(mean / (alive * pow((double)*gamma, 4))));
            if (mean > 0 && alive > 0) {
                *gamma *= (REAL)up;
                for (int j = 0; j < m; j++) V[j] /= (REAL)up;
            }
        }
        for (int j = 0; j < m; j++)
            if (H[(long)j * np + i] > 0) rows[count++] = j;
        REAL dgamma, gamma2 = *gamma;
        double norm = sqrt(bn_gradient(&set, i, rows, count, V, *gamma, H, s, G, dv, &dgamma));
        if (rho > 0 && norm > 0) {
            REAL c = (REAL)(rho / norm);
            for (int a = 0; a < count; a++) {
                int j = rows[a];
                for (int d = 0; d < ROW; d++) w2[d] = W[(long)j * ROW + d] + c * G[(long)j * ROW + d];
                s2[j] = forward(w2, set.Xt, n, np, H2 + (long)j * np);
                V2[j] = V[j] + c * dv[j];
            }
            gamma2 += c * dgamma;
            bn_gradient(&set, i, rows, count, V2, gamma2, H2, s2, G, dv, &dgamma);
        }
        *gamma -= lr * dgamma;
        for (int a = 0; a < count; a++) {
            int j = rows[a];
            REAL *w = W + (long)j * ROW;
            for (int d = 0; d < ROW; d++) w[d] -= lr * G[(long)j * ROW + d];
            V[j] -= lr * dv[j];
            s[j] = forward(w, set.Xt, n, np, H + (long)j * np);
        }
    }
    memcpy(W0, W, sizeof(REAL) * m * ROW);
    drop(set);
    free(rows), free(W), free(H), free(s), free(H2), free(s2), free(V2), free(G), free(dv), free(w2), free(f);
}
