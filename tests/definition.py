"""The noise, written a second time from its definition, without torch: slow, and shares no line with the library."""

import math

import numpy as np

WORD = np.uint64(0xFFFFFFFF)
ROUNDS = 7


def philox4x32(rounds, counter, key):
    """Philox4x32 (Salmon et al., 2011) on four counter words and two key words, each an integer or an array of them."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(rounds):
        product0 = np.uint64(0xD2511F53) * c[0]
        product1 = np.uint64(0xCD9E8D57) * c[2]
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ k[0],
            product1 & WORD,
            (product0 >> np.uint64(32)) ^ c[3] ^ k[1],
            product0 & WORD,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & WORD, (k[1] + np.uint64(0xBB67AE85)) & WORD]
    return c


def key_of(seed):
    seed %= 1 << 64
    return seed & 0xFFFFFFFF, seed >> 32


def draw16(seed, r, c, stage=0):
    """The 16-bit draws at the rows r of the channels c (arrays that broadcast)."""
    r, c = np.broadcast_arrays(np.asarray(r, dtype=np.uint64), np.asarray(c, dtype=np.uint64))
    group, lane = r >> np.uint64(3), r & np.uint64(7)
    words = philox4x32(ROUNDS, (group & WORD, c, group >> np.uint64(32), stage), key_of(seed))
    word = np.choose((lane >> np.uint64(1)).astype(np.int64), words)
    return (word >> (np.uint64(16) * (lane & np.uint64(1)))) & np.uint64(0xFFFF)


def threshold(p):
    return min(max(math.floor((1 - p) * 65536 + 0.5), 1), 65535)


def bernoulli(shape, p, seed, granularity):
    """m in float64, of the given shape."""
    if p in (0, 1):
        return np.full(shape, 1.0 - p)
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    rows = n if granularity == "channel" else n * s
    kept = draw16(seed, np.arange(rows)[:, None], np.arange(c)[None, :]) < threshold(p)
    m = np.where(kept, 65536 / threshold(p), 0.0)
    m = m.reshape(n, -1, c).transpose(0, 2, 1)
    return np.broadcast_to(m, (n, c, s)).reshape(shape)


def _rows_of(shape, granularity):
    """Rows r and channels c of the draws, as they broadcast, and how to give the result its shape."""
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    rows = n * s if granularity == "element" else n
    channels = 1 if granularity == "sample" else c

    def finish(m):  # (rows, channels)
        m = m.reshape(n, -1, channels).transpose(0, 2, 1)
        return np.broadcast_to(m, (n, c, s)).reshape(shape)

    return np.arange(rows)[:, None], np.arange(channels)[None, :], finish


def uniform(shape, beta, seed, granularity):
    """m in float32: 1 + beta t with one rounding, t the middle of the draw's interval in (-1, 1)."""
    r, c, finish = _rows_of(shape, granularity)
    t = (2 * draw16(seed, r, c).astype(np.longdouble) + 1) / 65536 - 1
    return finish((1 + np.longdouble(np.float32(beta)) * t).astype(np.float32))


def gaussian(shape, alpha, seed, granularity):
    """m in float64, as Box & Muller say; the kernels compute it in float32."""
    r, c, finish = _rows_of(shape, granularity)
    r, c = np.broadcast_arrays(r.astype(np.uint64), c.astype(np.uint64))
    group, lane = r >> np.uint64(3), (r & np.uint64(7)).astype(np.int64)
    words = philox4x32(ROUNDS, (group & WORD, c, group >> np.uint64(32), (lane // 4).astype(np.uint64)), key_of(seed))
    pair = lane % 4 // 2 * 2
    radius, angle = np.choose(pair, words).astype(float), np.choose(pair + 1, words).astype(float)
    u = (radius + 0.5) / 2**32
    turn = math.pi * (angle / 2**31 - 1)
    z = np.sqrt(-2 * np.log(u)) * np.where(lane % 2 == 0, np.cos(turn), np.sin(turn))
    return finish(1 + math.sqrt(alpha) * z)
