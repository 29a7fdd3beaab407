"""Three rewards of one's own, one per form: a function, a class with parameters, a batched async one."""
