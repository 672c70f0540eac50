"""What is about speed or about bits: functions of tensors, each chosen by the device and dtype of what it is given.

They know no module and no ModelArgs. What a result must be is said by the layers that call them; how it is computed,
and in which order its sums are taken, is said here.
"""
