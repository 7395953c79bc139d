"""The stages of the losses, once per backend; :mod:`vicreg_fast.dispatch` chooses between them."""
