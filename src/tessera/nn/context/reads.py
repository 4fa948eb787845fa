def reads(owned, bounds, window=None):
    n = bounds[-1]; doc = []
    for i in range(len(bounds) - 1): doc += [bounds[i]] * (bounds[i + 1] - bounds[i])
    own = [0] * n
    for r, cs in enumerate(owned):
        for a, b in cs:
            for t in range(a, b): own[t] = r
    res = []
    for r, cs in enumerate(owned):
        need = set()
        for a, b in cs:
            for t in range(a, b):
                need.update(range(max(doc[t], 0 if window is None else t - window + 1), t + 1))
        row = []
        for o in range(len(owned)):
            ts = sorted(t for t in need if own[t] == o and o != r); c = []
            for t in ts:
                if c and c[-1][1] == t: c[-1] = (c[-1][0], t + 1)
                else: c.append((t, t + 1))
            row.append(tuple(c))
        res.append(tuple(row))
    return tuple(res)
