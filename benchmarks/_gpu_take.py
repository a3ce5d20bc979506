def bring(out):
    pass
