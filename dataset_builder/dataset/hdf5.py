"""What is read of the HDF5 files of strangers: their own data alone.

HDF5 has links to other files, data in other files, and data that are assembled from other files.
"""

from stereovla.extras import extra

with extra("data"):
    import h5py


def own_data(file: h5py.File, key: str, most: int) -> h5py.Dataset:
    """The data under `key`, not read yet; ValueError for what lies outside of the file, or declares more than `most`
    numbers. KeyError where there is none.
    """
    item = file
    for part in key.split("/"):
        if not isinstance(item, h5py.Group):
            raise ValueError(f"{key} is not there, but data in the place of {item.name}")
        link = item.get(part, getlink=True)
        if link is not None and not isinstance(link, h5py.HardLink):
            raise ValueError(f"{key} is a link to something else; put the data in its place")
        item = item[part]
    if not isinstance(item, h5py.Dataset) or item.external or item.is_virtual:
        raise ValueError(f"{key} holds no data of its own")
    if item.size is None or item.size > most:
        raise ValueError(f"{key} declares {item.shape} numbers; at most {most} are read")
    return item
