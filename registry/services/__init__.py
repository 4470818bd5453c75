"""What the registry does: domain values in and out; each service owns its transactions.

catalogue      names, versions, aliases, bases: reading and pointing
publishing     folders into blobs and rows
compositions   recipes into plans and artefacts
repositories   what lies at a revision; pushing: commits that become versions and bases;
               repository_admin: created, renamed, deleted, branches, tags; listing: by tag
importing      adapters and bases of other hubs
jobs           compositions on the service, in the background
local          all of them behind registry.interface.Registry
"""
