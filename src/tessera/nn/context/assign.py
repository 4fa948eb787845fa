def assign(bounds, owners, windows=((None, 1),)):
    n = bounds[-1]; m = n // owners
    a = -(-m // 2); b = m - a
    sizes = [a] * owners + [b] * owners; at = [0]
    for s in sizes: at.append(at[-1] + s)
    out = []
    for r in range(owners):
        cs = [(at[r], at[r + 1]), (at[2 * owners - 1 - r], at[2 * owners - r])]
        cs = [c for c in cs if c[0] < c[1]]
        if len(cs) == 2 and cs[0][1] == cs[1][0]: cs = [(cs[0][0], cs[1][1])]
        out.append(tuple(cs))
    return tuple(out)
