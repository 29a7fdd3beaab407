"""Three users' rewards, one per form: a function, a class with parameters, a batched async one."""
