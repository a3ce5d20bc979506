def bring(out): pass
