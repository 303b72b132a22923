"""Rectified flow over a callable ``v(z, t)``: path, loss, flow times, guidance, solvers."""
