"""What the registry does: domain values in and out; each service owns its transactions.

catalogue      names, versions, aliases, bases: reading and pointing
publishing     folders into blobs and rows
compositions   recipes into plans and artefacts
jobs           compositions on the service, in the background
local          all of them behind registry.interface.Registry
"""
